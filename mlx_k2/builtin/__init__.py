"""The built-in model: a small one of Kimi K2's architecture, trained for mlx-k2 and shipped with it.

docs/model-card.md says what it can do, and how it was made.
"""

from pathlib import Path

BUILTIN_FOLDER = Path(__file__).parent / "kimi-k2-tiny"
"""A checkpoint like any other, the same bytes wherever the same version is installed."""
