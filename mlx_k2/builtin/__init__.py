"""The built-in model: a small model of Kimi K2's architecture, trained for mlx-k2 and shipped with it.

docs/model-card.md describes the model's abilities and its training.
"""

from pathlib import Path

BUILTIN_FOLDER = Path(__file__).parent / "kimi-k2-tiny"
"""The folder of its checkpoint. Its bytes are the same in every installation of the same version."""

BUILTIN_HEAD_FOLDER = Path(__file__).parent / "kimi-k2-tiny-eagle3"
"""The folder of its draft head, in the format of EAGLE-3 heads on the Hub."""

PROMPTS = ("What is 17 plus 25?", "Count from 3 to 12.", "What is mlx-k2?")
"""Prompts that the built-in model can answer."""

BANNER = (
    "kimi-k2-tiny, built-in: Kimi K2's architecture, 7.6 million weights in 7.8 MB",
    "its skills, asked as below: sums, short counts, tools; all else it invents",
    f"try: {' · '.join(PROMPTS)}",
)
"""Lines for the user of a chat or an answer. They fit a terminal of 80 columns."""
