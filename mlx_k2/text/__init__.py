"""Words to token ids and back: tokenizer, chat template, detokenizer. Never sees an array."""
