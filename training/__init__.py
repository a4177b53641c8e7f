"""Makes the built-in demo model: its text, vocabulary, training, scores and files. Not installed with mlx-k2."""
