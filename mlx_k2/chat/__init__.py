"""A conversation with a model that reasons and calls tools: messages in, events out. Knows no terminal."""
