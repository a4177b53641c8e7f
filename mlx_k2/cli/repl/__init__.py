"""What `mlx-k2 chat` is made of: keyboard, screen, commands, files."""
