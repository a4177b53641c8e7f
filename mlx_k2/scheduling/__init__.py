"""Scheduling: requests, sequences, slots, scheduler, cost model and step policy. Pure: no I/O, no MLX."""
