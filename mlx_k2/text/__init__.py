"""Conversion of text to token ids and back: tokenizer, chat template, replies. Knows no arrays."""
