"""The parts of `mlx-k2 chat`: keyboard, screen, commands, files."""
