"""Rotary positions with YaRN's frequencies (Peng et al., arXiv 2309.00071, section 3)."""

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_k2.config import ModelConfig, RopeConfig

Rotate = Callable[[mx.array, mx.array], mx.array]
"""(x (tokens, heads, qk_rope), positions (tokens,) int32) -> x, rotated"""


def make_rope(config: ModelConfig) -> Rotate:
    """Return the function that rotates consecutive pairs of values ("interleaved") by their token's position."""
    dims, rope = config.qk_rope_head_dim, config.rope
    inverse_frequencies = _inverse_frequencies(rope, dims)
    mx.eval(inverse_frequencies)  # otherwise every layer of every step would compute them again
    scale = rope.temperature(rope.mscale) / rope.temperature(rope.mscale_all_dim)

    def rotate(x: mx.array, positions: mx.array) -> mx.array:
        scaled = x if scale == 1.0 else x * scale
        rotated = mx.fast.rope(  # each token is a batch of length 1
            scaled[:, :, None],
            dims,
            traditional=True,
            base=None,
            scale=1.0,
            offset=positions,
            freqs=inverse_frequencies,
        )
        return rotated.squeeze(2)

    return rotate


def _inverse_frequencies(rope: RopeConfig, dims: int) -> mx.array:
    """Return the inverse frequency of each pair, in positions per radian: (dims / 2,) float32.

    Pairs that turn more than ``beta_fast`` times within the original context keep their frequency. That of pairs that
    turn fewer than ``beta_slow`` times is divided by ``factor``. Between both a linear ramp mixes the two frequencies.
    """

    def pair_with(num_turns: float) -> float:
        positions_per_radian = rope.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return dims * math.log(positions_per_radian) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_with(rope.beta_fast)), 0)
    last = min(math.ceil(pair_with(rope.beta_slow)), dims - 1)
    width = last - first if last != first else 0.001  # as in the published code: a step in place of a ramp
    original_weight = 1.0 - mx.clip((mx.arange(dims // 2, dtype=mx.float32) - first) / width, 0, 1)
    original = rope.theta ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    stretched = rope.factor * original
    return (stretched * original) / (stretched * original_weight + original * (1 - original_weight))
