"""Text: tokenizer, incremental detokenizer, stop strings, chat template. Imports no torch."""
