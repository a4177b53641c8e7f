"""Kimi K2 models across two or more Apple-silicon Macs."""

__version__ = "0.1.0"
