"""Test doubles and made-up inputs for tests and benchmarks. Nothing else in mlx_k2 imports it."""
