"""Prompts of the Kimi K2 family with their templates (tests/text/goldens), and Kimi's own vocabulary."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.text.chat_template import ChatTemplate
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer

GOLDENS = Path(__file__).parent / "goldens"
MODELS = ("kimi-k2-instruct", "kimi-k2-thinking", "kimi-k2.5", "kimi-k2.6", "kimi-k2.7-code")
VOCAB_SIZE = 163_840
VOCABULARY_FILES = ("tiktoken.model", "tokenizer_config.json")
FOLDER = Path(os.environ.get("MLX_K2_KIMI_FILES") or Path(__file__).parents[2].parent / "shared" / "kimi")
"""The folder of Kimi's vocabulary. It is the same for all models of the family."""

needs_vocabulary = pytest.mark.skipif(
    not all((FOLDER / name).exists() for name in VOCABULARY_FILES),
    reason=f"needs Kimi's vocabulary: hf download moonshotai/Kimi-K2.6 {' '.join(VOCABULARY_FILES)} "
    f"--local-dir {FOLDER}, or name its folder in MLX_K2_KIMI_FILES",
)


def golden_prompts(model: str) -> list[dict[str, Any]]:
    """Return the lines of a golden file; tests/text/goldens/README.md describes their fields."""
    return [json.loads(line) for line in (GOLDENS / f"{model}.jsonl").read_text().splitlines()]


def template_source(model: str) -> str:
    return (GOLDENS / f"{model}.jinja").read_text()


@functools.cache
def template(model: str) -> ChatTemplate:
    return ChatTemplate(template_source(model))


def vocabulary() -> dict[str, bytes]:
    return {name: (FOLDER / name).read_bytes() for name in VOCABULARY_FILES}


@functools.cache
def kimi_tokenizer() -> Tokenizer:
    return load_tokenizer(vocabulary(), VOCAB_SIZE)
