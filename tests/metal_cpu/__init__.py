"""Runs Metal kernels on a CPU, from the very source that MLX would compile on a Mac."""
