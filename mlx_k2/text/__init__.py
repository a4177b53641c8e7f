"""Conversion of text to token ids and back: tokenizer, chat template, detokenizer. Knows no arrays."""
