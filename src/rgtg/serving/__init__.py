"""An OpenAI-compatible server with guidance per request, and a web page (extra ``serve``)."""
