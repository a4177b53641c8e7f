"""The checkpoint: its tensors, the files that hold them, and how files are fetched and tensors read."""
