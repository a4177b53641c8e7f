"""An executor of Metal kernels on a CPU, from the same source that MLX would compile on a Mac."""
