"""The stage program: python -m mlx_k2.stage. Knows no text, no requests, no other stage's layers."""
