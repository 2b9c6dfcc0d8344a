"""The HTTP server: OpenAI's API, metrics and the live page."""
