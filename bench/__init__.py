"""Benchmarks: one script per question. METHODOLOGY.md describes how they measure."""
