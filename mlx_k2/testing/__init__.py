"""Test doubles and generated inputs for tests and benchmarks. No other package of mlx_k2 imports this one."""
