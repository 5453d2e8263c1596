"""An OpenAI-compatible server with guidance per request, and a page to watch it (extra ``serve``)."""
