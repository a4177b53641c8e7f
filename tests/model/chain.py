"""The stages of a model, run one after the other in this process: from token ids to logits, without step plans."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_k2.config import ModelConfig
from mlx_k2.model.batch import Batch, Span
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.stage_model import StageModel
from mlx_k2.protocol.messages import LayerLoaded
from mlx_k2.stage.loading import load_stage_model
from mlx_k2.weights.index import CheckpointIndex, read_index_json
from mlx_k2.weights.reader import ShardReader
from tests.model.checkpoints import read_config

CONTEXT_TOKENS = 1024
SpanTokens = tuple[Span, Sequence[int]]
"""A span and its token ids."""


class Chain:
    """A whole model in float32, in ``num_stages`` stages with one cache each."""

    def __init__(self, folder: Path, num_stages: int, num_slots: int = 4, dense_bits: int | None = None) -> None:
        self.config = read_config(folder)
        self.caches: list[LatentCache] = []
        self.stages: list[StageModel] = []
        for layers in split_layers(self.config.num_hidden_layers, num_stages):
            row_dim = self.config.cache_row_dim
            self.caches.append(LatentCache(len(layers), num_slots, CONTEXT_TOKENS, row_dim, mx.float32))
            self.stages.append(load_stage(folder, self.config, layers, self.caches[-1], dense_bits))

    def run(self, *spans: SpanTokens) -> mx.array:
        """Run spans, with the tokens of each, in one batch. Return the evaluated logits (tokens, vocabulary)."""
        batch = Batch([span for span, _ in spans])
        hidden = self.stages[0].embed(mx.array([token_id for _, token_ids in spans for token_id in token_ids]))
        for stage in self.stages:
            hidden, _ = stage.run(hidden, batch)
        logits = self.stages[-1].logits(hidden)
        mx.eval(logits)
        return logits

    def prefill(self, token_ids: Sequence[int], slot: int = 0, chunk_tokens: int | None = None) -> mx.array:
        """Return a prompt's logits (tokens, vocabulary), ``chunk_tokens`` at a time (None: all), by naive attention."""
        return self._in_chunks(token_ids, slot, 0, chunk_tokens, is_prompt=True)

    def decode(
        self, token_ids: Sequence[int], position: int, slot: int = 0, chunk_tokens: int | None = None
    ) -> mx.array:
        """Return the logits of generated tokens from ``position`` on, like `prefill`, but by absorbed attention."""
        return self._in_chunks(token_ids, slot, position, chunk_tokens, is_prompt=False)

    def _in_chunks(
        self, token_ids: Sequence[int], slot: int, position: int, chunk_tokens: int | None, *, is_prompt: bool
    ) -> mx.array:
        size = chunk_tokens or len(token_ids)
        chunks = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
        logits = []
        for chunk in chunks:
            logits.append(self.run((Span(slot, position, len(chunk), is_prompt), chunk)))
            position += len(chunk)
        return mx.concatenate(logits)

    def greedy(self, prompt: Sequence[int], num_tokens: int, slot: int = 0) -> list[int]:
        """Return the most likely tokens after ``prompt``, decoded one by one."""
        token_ids = [likeliest(self.prefill(prompt, slot)[-1])]
        while len(token_ids) < num_tokens:
            position = len(prompt) + len(token_ids) - 1
            token_ids.append(likeliest(self.decode(token_ids[-1:], position, slot)[-1]))
        return token_ids


@contextmanager
def like_a_stage_on_a_cpu() -> Iterator[None]:
    """Set up MLX as the stage program does on a CPU, also on a machine with a GPU: nothing is compiled."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    yield
    mx.enable_compile()
    mx.set_default_device(device)


def load_stage(
    folder: Path, config: ModelConfig, layers: range, cache: LatentCache, dense_bits: int | None = None
) -> StageModel:
    """Load one stage of the checkpoint in ``folder``, in float32."""
    return load_stage_model(config, open_shards(folder, config), layers, cache, lambda _: None, dense_bits)


def loaded_bytes(folder: Path, dense_bits: int | None) -> list[int]:
    """Return the bytes in memory of the embedding, each layer and the head in float32."""
    config = read_config(folder)
    layers = range(config.num_hidden_layers)
    cache = LatentCache(len(layers), num_slots=1, context_tokens=256, row_dim=config.cache_row_dim, dtype=mx.float32)
    messages: list[LayerLoaded] = []
    load_stage_model(config, open_shards(folder, config), layers, cache, messages.append, dense_bits)
    return [message.held_bytes for message in messages]


def open_shards(folder: Path, config: ModelConfig) -> ShardReader:
    """Return a reader of the checkpoint in ``folder``, in float32."""
    index = CheckpointIndex.from_json(read_index_json(folder), str(folder))
    return ShardReader(config, {name: folder / file for name, file in index.weight_map.items()}, mx.float32)


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Divide the layers among the stages, as evenly as whole layers allow."""
    bounds = [num_layers * stage // num_stages for stage in range(num_stages + 1)]
    return [range(first, end) for first, end in itertools.pairwise(bounds)]


def likeliest(logits: mx.array) -> int:
    """Return the token with the largest logit of one row."""
    return int(np.argmax(np.asarray(logits)))


def largest_difference(left: mx.array, right: mx.array) -> float:
    """Return the largest absolute difference between two arrays of one shape."""
    assert left.shape == right.shape
    return float(np.abs(np.asarray(left) - np.asarray(right)).max())
