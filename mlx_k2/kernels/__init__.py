"""INT4 routed experts and their router: Metal kernels, and the same operations in plain MLX."""
