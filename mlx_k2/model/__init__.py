"""Kimi K2 itself: one range of layers over a cache. Knows no processes and no text."""
