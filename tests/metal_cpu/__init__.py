"""Executor of Metal kernels on a CPU, from the source that MLX would compile on a Mac."""
