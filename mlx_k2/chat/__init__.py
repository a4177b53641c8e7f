"""A conversation with a model that thinks and calls tools: messages in, deltas out. Knows no terminal."""
