"""Text: the tokenizer, incremental detokenization, and stop strings."""
