"""The engine thread with its pipeline of stages, token policies of replies, and batches. Knows no terminal."""
