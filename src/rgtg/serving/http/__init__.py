"""The HTTP API: OpenAI's formats with guidance."""
