"""Rotary positions with YaRN's frequencies (Peng et al., arXiv 2309.00071, section 3)."""

import math
from collections.abc import Callable

import mlx.core as mx

from mlx_k2.config import ModelConfig, RopeConfig

Rotate = Callable[[mx.array, mx.array], mx.array]


def make_rope(config: ModelConfig) -> Rotate:
    """Return the rotation of (tokens, heads, qk_rope) at positions (tokens,) int32.

    Consecutive pairs are rotated ("interleaved"). ``beta_fast`` and ``beta_slow`` are read from the config, because
    they differ within the family (1 and 1 for K2-Thinking, 32 and 1 from K2.5 on).
    """
    dims, rope = config.qk_rope_head_dim, config.rope
    inverse_frequencies = _inverse_frequencies(rope, dims)
    mx.eval(inverse_frequencies)  # left lazy, every layer of every step would compute them again
    length = rope.temperature(rope.mscale) / rope.temperature(rope.mscale_all_dim)

    def rotate(x: mx.array, positions: mx.array) -> mx.array:
        scaled = x if length == 1.0 else x * length
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
    """Return the positions per radian of each pair, (dims / 2,) float32.

    Pairs of more than beta_fast turns in the positions of the original training keep theirs, pairs of fewer than
    beta_slow turns get theirs times the factor, and between both the frequencies are mixed by a linear ramp.
    """

    def pair_of(turns: float) -> float:
        positions_per_radian = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return dims * math.log(positions_per_radian) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_of(rope.beta_fast)), 0)
    last = min(math.ceil(pair_of(rope.beta_slow)), dims - 1)
    width = last - first if last != first else 0.001
    slowed = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - first) / width, 0, 1)
    kept = 1.0 - slowed
    original = rope.theta ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    stretched = rope.factor * original
    return (stretched * original) / (stretched * kept + original * (1 - kept))
