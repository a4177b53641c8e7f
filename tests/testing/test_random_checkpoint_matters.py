"""Tests of random checkpoints in mlx-lm: every part of the model changes the logits, and greedy text varies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import deepseek_v3
from mlx_lm.models.cache import make_prompt_cache

from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields
from tests.weights.tiny_checkpoints import VOCAB_SIZE

MIN_CHANGE = 0.02
"""Smallest change of a logit: 100 times the tolerance of the comparisons between this program and mlx-lm."""
PROMPT = list(range(10, 74))

Weights = dict[str, mx.array]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random") / "model"
    write_random_checkpoint(folder, tiny_config_fields(VOCAB_SIZE), seed=0, tokenizer_files={})
    return folder


@pytest.fixture(scope="module")
def logits(folder: Path) -> mx.array:
    return run(load(folder))


def run(model: Any) -> mx.array:
    return cast(mx.array, model(mx.array([PROMPT])))


def largest_difference(left: mx.array, right: mx.array) -> float:
    return cast(float, mx.abs(left - right).max().item())


def load(folder: Path, change: Callable[[Weights], None] = lambda _: None) -> Any:
    """Return mlx-lm's DeepseekV3 in float32 with INT4 experts, built as by its loader. ``change`` edits the weights."""
    model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(json.loads((folder / "config.json").read_text())))
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= dict(mx.load(str(path)).items())  # type: ignore[union-attr]
    change(weights)
    floats = {
        name: array.astype(mx.float32) if array.dtype == mx.bfloat16 else array for name, array in weights.items()
    }
    renamed = model.sanitize(floats)
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, _: f"{path}.scales" in renamed)
    model.load_weights(list(renamed.items()), strict=True)
    return model


def change_without(folder: Path, logits: mx.array, *endings: str, containing: tuple[str, ...] = ("",)) -> float:
    """Return the largest change of a logit if some tensors are zero.

    These are the tensors whose names have one of ``endings`` and contain one of ``containing``.
    """

    def zero_tensors(weights: Weights) -> None:
        names = [name for name in weights if name.endswith(endings) and any(part in name for part in containing)]
        assert names
        for name in names:
            weights[name] = mx.zeros_like(weights[name])

    return largest_difference(run(load(folder, zero_tensors)), logits)


@pytest.mark.parametrize("layer", range(7))
def test_omitting_a_layer_changes_the_logits(folder: Path, logits: mx.array, layer: int) -> None:
    endings = ("o_proj.weight", "down_proj.weight", "down_proj.weight_scale")
    assert change_without(folder, logits, *endings, containing=(f"layers.{layer}.",)) > MIN_CHANGE


@pytest.mark.parametrize("layer", range(1, 7))
@pytest.mark.parametrize("group", range(4))
def test_omitting_a_group_of_experts_changes_the_logits(folder: Path, logits: mx.array, layer: int, group: int) -> None:
    experts = tuple(f"layers.{layer}.mlp.experts.{expert}." for expert in range(4 * group, 4 * group + 4))
    assert change_without(folder, logits, "down_proj.weight_scale", containing=experts) > MIN_CHANGE


def test_omitting_the_shared_experts_or_the_correction_bias_changes_the_logits(folder: Path, logits: mx.array) -> None:
    assert change_without(folder, logits, "shared_experts.down_proj.weight") > MIN_CHANGE
    assert change_without(folder, logits, "e_score_correction_bias") > MIN_CHANGE


@pytest.mark.parametrize("layer", range(7))
def test_omitting_rope_in_one_layer_changes_the_logits(folder: Path, logits: mx.array, layer: int) -> None:
    model = load(folder)
    model.model.layers[layer].self_attn.rope = lambda values, _offset: values
    assert largest_difference(run(model), logits) > MIN_CHANGE


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [[3], [1, 2, 3, 4, 5, 6, 7, 8], [5] * 16])
def test_among_200_greedy_tokens_at_least_50_are_different(folder: Path, prompt: list[int]) -> None:
    model = load(folder)
    cache = make_prompt_cache(model)
    tokens: list[int] = []
    input_ids = prompt
    for _ in range(200):
        tokens.append(cast(int, mx.argmax(model(mx.array([input_ids]), cache=cache)[0, -1]).item()))
        input_ids = [tokens[-1]]
    assert len(set(tokens)) >= 50
