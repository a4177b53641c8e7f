"""Tests of the built-in model: its loss on held-out replies is low, and a mistake in the program raises it.

The held-out questions and their right replies come from the package training. Each whole conversation runs in one
pass. The loss is the mean of -log(probability) over the tokens of the replies.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.model.batch import Batch, Span
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.stage_model import StageModel
from mlx_k2.stage.loading import load_stage_model
from mlx_k2.weights.checkpoint import ModelDescription, describe_model, locate_tensors, read_small_files
from mlx_k2.weights.inventory import shard_specs
from mlx_k2.weights.reader import ShardReader
from training.conversation import render
from training.data import QUESTIONS_PER_SKILL, held_out
from training.vocabulary import load_encoding

EVERY = 150
"""Step between the questions that are used, which gives one or two for each skill."""
WHOLE = ([0, 1, 2, 3, 4, 5, 6],)
LONGEST = 512


class Reply:
    """Token ids of a conversation, and a mask of those that the model has to write."""

    def __init__(self, pieces: Sequence[tuple[list[int], bool]]) -> None:
        self.ids = [token_id for ids, _ in pieces for token_id in ids]
        self.is_reply = np.array([is_reply for ids, is_reply in pieces for _ in ids])


@pytest.fixture(scope="module")
def replies() -> list[Reply]:
    encoding = load_encoding(BUILTIN_FOLDER / "tiktoken.model")
    questions = held_out().questions
    assert len(questions) % QUESTIONS_PER_SKILL == 0
    return [
        Reply(
            [
                (encoding.encode(piece.text, allowed_special="all"), piece.is_reply)
                for piece in render(question.conversation)
            ]
        )
        for question in questions[::EVERY]
    ]


def describe(folder: Path) -> ModelDescription:
    return describe_model(read_small_files(folder), str(folder))


def load(folder: Path, layers: range) -> StageModel:
    description = describe(folder)
    config = description.config
    files = locate_tensors(folder, description.index, shard_specs(config, layers.start, layers.stop))
    cache = LatentCache(len(layers), 1, LONGEST, config.cache_row_dim, mx.float32)
    return load_stage_model(config, ShardReader(config, files, mx.float32), layers, cache, lambda _: None)


def mean_loss(folder: Path, replies: Sequence[Reply], order: Sequence[Sequence[int]] = WHOLE) -> float:
    """Return the mean of -log(probability) over all reply tokens, through the layers in ``order``."""
    stages = [load(folder, range(part[0], part[-1] + 1)) for part in order]
    surprises: list[np.ndarray] = []
    for reply in replies:
        hidden = stages[0].embed(mx.array(reply.ids))
        batch = Batch([Span(0, 0, len(reply.ids), is_prompt=True)])
        for stage in stages:
            hidden, _ = stage.run(hidden, batch)
        logits = stages[-1].logits(hidden)[:-1]
        logprobs = np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        of_written = logprobs[np.arange(len(reply.ids) - 1), reply.ids[1:]]
        surprises.append(-of_written[reply.is_reply[1:]])
    return float(np.concatenate(surprises).mean())


@pytest.fixture(scope="module")
def baseline(replies: list[Reply]) -> float:
    return mean_loss(BUILTIN_FOLDER, replies)


@pytest.mark.slow
def test_the_built_in_model_predicts_the_right_replies(baseline: float) -> None:
    assert baseline < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "order",
    [
        ([0, 1, 2], [4, 5, 6]),
        ([0, 1], [4], [3], [2], [5, 6]),
        ([0, 1, 2, 3], [5], [4], [6]),
    ],
    ids=["a layer left out", "two layers swapped", "two neighbours swapped"],
)
def test_wrongly_ordered_layers_raise_the_loss(
    replies: list[Reply], baseline: float, order: Sequence[Sequence[int]]
) -> None:
    assert mean_loss(BUILTIN_FOLDER, replies, order) > 3 * baseline


def reverse_nibbles(folder: Path) -> None:
    """Reverse the order of the eight codes in every packed word."""
    for file in folder.glob("*.safetensors"):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        for name, tensor in tensors.items():
            if name.endswith("weight_packed"):
                words = np.asarray(tensor.view(mx.uint32))
                turned = sum(((words >> 4 * position) & 15) << (28 - 4 * position) for position in range(8))
                tensors[name] = mx.array(np.asarray(turned, np.uint32)).view(mx.int32)
        mx.eval(tensors)
        mx.save_safetensors(str(file), tensors, {"format": "pt"})


def use_usual_beta_fast(folder: Path) -> None:
    """Set beta_fast to YaRN's usual value, 32, instead of Kimi-K2-Thinking's, 1."""
    config = json.loads((folder / "config.json").read_bytes())
    assert config["rope_scaling"]["beta_fast"] == 1.0
    config["rope_scaling"]["beta_fast"] = 32.0
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [reverse_nibbles, use_usual_beta_fast])
def test_damaged_weights_or_positions_raise_the_loss(
    replies: list[Reply], baseline: float, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(BUILTIN_FOLDER, folder)
    damage(folder)
    assert mean_loss(folder, replies) > 3 * baseline


def test_the_built_in_model_has_at_most_8_mb_an_odd_layer_count_and_several_files() -> None:
    assert sum(file.stat().st_size for file in BUILTIN_FOLDER.iterdir()) <= 8_000_000
    config = describe(BUILTIN_FOLDER).config
    assert config.num_hidden_layers % 2 == 1
    assert len(list(BUILTIN_FOLDER.glob("*.safetensors"))) >= 2
