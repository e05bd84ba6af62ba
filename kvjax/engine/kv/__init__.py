"""KV between the runner and the store: prefixes that are loaded, prompts and generated tokens that are written."""
