"""The operations worth writing by hand: each a Metal kernel and its twin in plain mlx."""
