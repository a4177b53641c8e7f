"""Tests of the built-in model: its loss on held-out replies is low, and wrong layers, weights or positions raise it.

The held-out questions and their right replies come from training/. A conversation runs in one forward pass.
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
from training.data import QUESTIONS_PER_SKILL, Question, held_out
from training.vocabulary import load_encoding

QUESTION_STRIDE = 150
"""Every QUESTION_STRIDE-th question is used. They are ordered by skill, 200 of each: so one or two of each skill."""
ONE_STAGE = ([0, 1, 2, 3, 4, 5, 6],)
MAX_CONVERSATION_TOKENS = 512


class Conversation:
    """Token ids of a conversation, and a mask of those that belong to the model's replies."""

    def __init__(self, pieces: Sequence[tuple[list[int], bool]]) -> None:
        self.ids = [token_id for ids, _ in pieces for token_id in ids]
        self.is_reply = np.array([is_reply for ids, is_reply in pieces for _ in ids])


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    encoding = load_encoding(BUILTIN_FOLDER / "tiktoken.model")
    questions = held_out().questions
    assert len(questions) % QUESTIONS_PER_SKILL == 0

    def tokenize(question: Question) -> Conversation:
        pieces = render(question.conversation)
        return Conversation([(encoding.encode(piece.text, allowed_special="all"), piece.is_reply) for piece in pieces])

    return [tokenize(question) for question in questions[::QUESTION_STRIDE]]


def describe(folder: Path) -> ModelDescription:
    return describe_model(read_small_files(folder), str(folder))


def load(folder: Path, layers: range) -> StageModel:
    description = describe(folder)
    config = description.config
    files = locate_tensors(folder, description.index, shard_specs(config, layers.start, layers.stop))
    cache = LatentCache(len(layers), 1, MAX_CONVERSATION_TOKENS, config.cache_row_dim, mx.float32)
    return load_stage_model(config, ShardReader(config, files, mx.float32), layers, cache, lambda _: None)


def mean_loss(folder: Path, conversations: Sequence[Conversation], order: Sequence[Sequence[int]] = ONE_STAGE) -> float:
    """Return the mean of -log(probability) over all reply tokens.

    ``order`` has the layers of each stage, consecutive ones, in the order in which the stages run.
    """
    stages = [load(folder, range(layers[0], layers[-1] + 1)) for layers in order]
    losses: list[np.ndarray] = []
    for conversation in conversations:
        ids = conversation.ids
        hidden = stages[0].embed(mx.array(ids))
        batch = Batch([Span(0, 0, len(ids), is_prompt=True)])
        for stage in stages:
            hidden, _ = stage.run(hidden, batch)
        logits = stages[-1].logits(hidden)[:-1]
        logprobs = np.asarray(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        token_logprobs = logprobs[np.arange(len(ids) - 1), ids[1:]]
        losses.append(-token_logprobs[conversation.is_reply[1:]])
    return float(np.concatenate(losses).mean())


@pytest.fixture(scope="module")
def baseline(conversations: list[Conversation]) -> float:
    return mean_loss(BUILTIN_FOLDER, conversations)


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
def test_missing_or_swapped_layers_raise_the_loss(
    conversations: list[Conversation], baseline: float, order: Sequence[Sequence[int]]
) -> None:
    assert mean_loss(BUILTIN_FOLDER, conversations, order) > 3 * baseline


def reverse_codes(folder: Path) -> None:
    """Reverse the order of the eight INT4 codes in every packed word."""
    for file in folder.glob("*.safetensors"):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        for name, tensor in tensors.items():
            if name.endswith("weight_packed"):
                words = np.asarray(tensor.view(mx.uint32))
                reversed_words = sum(((words >> 4 * index) & 15) << (28 - 4 * index) for index in range(8))
                tensors[name] = mx.array(np.asarray(reversed_words, np.uint32)).view(mx.int32)
        mx.eval(tensors)
        mx.save_safetensors(str(file), tensors, {"format": "pt"})


def use_usual_beta_fast(folder: Path) -> None:
    """Set beta_fast to YaRN's usual value, 32, instead of Kimi-K2-Thinking's, 1."""
    config = json.loads((folder / "config.json").read_bytes())
    assert config["rope_scaling"]["beta_fast"] == 1.0
    config["rope_scaling"]["beta_fast"] = 32.0
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [reverse_codes, use_usual_beta_fast])
def test_damaged_weights_or_positions_raise_the_loss(
    conversations: list[Conversation], baseline: float, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(BUILTIN_FOLDER, folder)
    damage(folder)
    assert mean_loss(folder, conversations) > 3 * baseline


def test_the_built_in_model_has_at_most_8_mb_an_odd_layer_count_and_several_files() -> None:
    assert sum(file.stat().st_size for file in BUILTIN_FOLDER.iterdir()) <= 8_000_000
    config = describe(BUILTIN_FOLDER).config
    assert config.num_hidden_layers % 2 == 1
    assert len(list(BUILTIN_FOLDER.glob("*.safetensors"))) >= 2
