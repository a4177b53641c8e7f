"""The built-in model: a small model of Kimi K2's architecture, trained for mlx-k2 and shipped with it.

docs/model-card.md describes its abilities and its training.
"""

from pathlib import Path

BUILTIN_FOLDER = Path(__file__).parent / "kimi-k2-tiny"
"""An ordinary checkpoint folder. Its bytes are the same in every installation of the same version."""
