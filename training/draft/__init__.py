"""The training of the built-in model's draft head (EAGLE-3), in MLX."""
