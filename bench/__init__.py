"""Benchmarks: one script for each question; METHODOLOGY.md says how they measure."""
