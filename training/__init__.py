"""Training of the built-in demo model: its text, vocabulary, scores and files. Not installed with mlx-k2."""
