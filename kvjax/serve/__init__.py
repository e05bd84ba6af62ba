"""The OpenAI-compatible server: `python -m kvjax.serve [MODEL]`."""
