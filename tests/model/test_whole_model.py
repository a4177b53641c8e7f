"""Tests of the whole model: each part affects the logits, absorbed and naive attention agree, text does not loop."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.config import ModelConfig
from mlx_k2.kernels.experts import route
from mlx_k2.kernels.reference import RouterRule
from mlx_k2.kernels.stack import AffineStack
from mlx_k2.model import decoder_layer
from mlx_k2.model.batch import Batch, Span
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import LayerWeights, MoeWeights, assemble_layer
from mlx_k2.model.stage_model import Head, StageModel
from tests.model.chain import Chain, largest_difference, open_shards
from tests.model.checkpoints import Checkpoint, read_config

TOLERANCE = 2e-4
"""Largest difference of logits that rounding in float32 may cause. Each part of the model changes them by far more."""
PROMPT = list(range(10, 58))


class Parts(NamedTuple):
    """The parts of a model, from which it can be rebuilt with a part changed or left out."""

    config: ModelConfig
    embedding: mx.array
    layers: tuple[LayerWeights, ...]
    head: Head

    def logits(self) -> mx.array:
        """Return the logits of PROMPT."""
        cache = LatentCache(
            len(self.layers), num_slots=1, context_tokens=256, row_dim=self.config.cache_row_dim, dtype=mx.float32
        )
        model = StageModel(self.config, list(self.layers), self.embedding, self.head, cache)
        batch = Batch([Span(0, 0, len(PROMPT), is_prompt=True)])
        return model.logits(model.run(model.embed(mx.array(PROMPT)), batch)[0])

    def with_moe(self, layer: int, change: Callable[[MoeWeights], MoeWeights]) -> "Parts":
        """Return the parts with one layer's experts changed."""
        weights = self.layers[layer]
        assert isinstance(weights.feed_forward, MoeWeights)
        changed = weights._replace(feed_forward=change(weights.feed_forward))
        return self._replace(layers=(*self.layers[:layer], changed, *self.layers[layer + 1 :]))


@pytest.fixture(scope="module")
def parts(checkpoint: Checkpoint) -> Parts:
    folder = checkpoint("thinking")
    config = read_config(folder)
    reader = open_shards(folder, config)
    layers = tuple(
        assemble_layer(config, layer, reader.layer(layer).tensors) for layer in range(config.num_hidden_layers)
    )
    head = reader.head().tensors
    return Parts(
        config,
        reader.embedding().tensors["model.embed_tokens.weight"],
        layers,
        Head(head["model.norm.weight"], head["lm_head.weight"].T),
    )


@pytest.fixture(scope="module")
def logits(parts: Parts) -> mx.array:
    return parts.logits()


@pytest.mark.parametrize("layer", range(7))
def test_omitting_a_layer_changes_the_logits(parts: Parts, logits: mx.array, layer: int) -> None:
    without = parts._replace(layers=parts.layers[:layer] + parts.layers[layer + 1 :])
    assert largest_difference(without.logits(), logits) > 100 * TOLERANCE


@pytest.mark.parametrize("layer", range(1, 7))
def test_omitting_four_consecutive_experts_changes_the_logits(parts: Parts, logits: mx.array, layer: int) -> None:
    num_experts = parts.config.n_routed_experts
    for first in range(0, num_experts, 4):
        members = (mx.arange(num_experts) // 4 == first // 4)[:, None, None]

        def omit(moe: MoeWeights, members: mx.array = members) -> MoeWeights:
            stack = moe.experts
            assert isinstance(stack, AffineStack)
            # With scales and biases of 0 the last projection's output is 0.
            experts = stack.experts._replace(down_scale=mx.where(members, 0.0, stack.experts.down_scale))
            bias = mx.where(members, 0.0, stack.down_bias)
            return moe._replace(experts=stack._replace(experts=experts, down_bias=bias))

        assert largest_difference(parts.with_moe(layer, omit).logits(), logits) > 100 * TOLERANCE


@pytest.mark.parametrize("layer", range(1, 7))
def test_omitting_a_shared_expert_changes_the_logits(parts: Parts, logits: mx.array, layer: int) -> None:
    without = parts.with_moe(layer, lambda moe: moe._replace(shared=None))
    assert largest_difference(without.logits(), logits) > 100 * TOLERANCE


def test_omitting_rope_changes_the_logits(parts: Parts, logits: mx.array, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_layer, "make_rope", lambda _config: lambda x, _positions: x)
    assert largest_difference(parts.logits(), logits) > 100 * TOLERANCE


@pytest.mark.parametrize("prompt", [[3], pytest.param([1, 2, 3, 4, 5, 6, 7, 8], marks=pytest.mark.slow)])
def test_among_200_greedy_tokens_at_least_50_are_different(chain: Chain, prompt: Sequence[int]) -> None:
    assert len(set(chain.greedy(prompt, 200))) >= 50


class RecordedRouter:
    """A router that records the experts that the model's router chooses, and chooses them again in the same order."""

    def __init__(self) -> None:
        self.chosen: list[mx.array] = []
        self._num_replayed = 0

    def record(self, hidden: mx.array, router: mx.array, bias: mx.array, rule: RouterRule) -> tuple[mx.array, mx.array]:
        expert_ids, weights = route(hidden, router, bias, rule)
        self.chosen.append(expert_ids)
        return expert_ids, weights

    def replay(self, hidden: mx.array, router: mx.array, bias: mx.array, rule: RouterRule) -> tuple[mx.array, mx.array]:
        """Return the recorded experts, with weights from these hidden states."""
        expert_ids = self.chosen[self._num_replayed]
        self._num_replayed += 1
        scores = mx.take_along_axis(mx.sigmoid(hidden @ router.T), expert_ids, axis=-1)
        return expert_ids, scores / scores.sum(axis=-1, keepdims=True) * rule.scaling_factor


@pytest.mark.parametrize("variant", ["thinking", "direct query, groups"])
def test_absorbed_and_naive_attention_agree_in_the_whole_model_with_the_same_expert_choice(
    checkpoint: Checkpoint, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = RecordedRouter()
    monkeypatch.setattr(decoder_layer, "route", router.record)
    naive = Chain(checkpoint(variant), 1).prefill(PROMPT)
    monkeypatch.setattr(decoder_layer, "route", router.replay)
    absorbed = Chain(checkpoint(variant), 1).decode(PROMPT, 0)
    assert len(router.chosen) == 6  # layers with experts
    assert not mx.array_equal(absorbed, naive), "the two forms would not be different computations"
    assert largest_difference(absorbed, naive) < TOLERANCE


@pytest.mark.parametrize("variant", ["thinking", "direct query, groups"])
def test_absorbed_and_naive_attention_agree_in_one_layer(checkpoint: Checkpoint, variant: str) -> None:
    folder = checkpoint(variant)
    config = read_config(folder)
    weights = assemble_layer(config, 0, open_shards(folder, config).layer(0).tensors)  # dense: no expert is chosen
    run_layer = decoder_layer.DecoderLayer(config).run
    hidden = mx.random.normal((len(PROMPT), config.hidden_size), key=mx.random.key(0))

    def run(*, is_prompt: bool) -> mx.array:
        cache = LatentCache(
            num_layers=1, num_slots=1, context_tokens=256, row_dim=config.cache_row_dim, dtype=mx.float32
        )
        batch = Batch([Span(0, 0, len(PROMPT), is_prompt)])
        return run_layer(hidden, 0, weights, batch, cache)

    naive, absorbed = run(is_prompt=True), run(is_prompt=False)
    assert not mx.array_equal(absorbed, naive)
    assert largest_difference(absorbed, naive) < 1e-5 * float(np.abs(np.asarray(naive)).max())
