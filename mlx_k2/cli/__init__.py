"""The mlx-k2 command: options, terminal output, exit codes."""
