"""Rotary positions with YaRN, as mlx-lm computes them. Knows no heads."""

from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.rope_utils import YarnRoPE

from mlx_k2.config import ModelConfig

Rotate = Callable[[mx.array, mx.array], mx.array]


def make_rope(config: ModelConfig) -> Rotate:
    """The rotation of (tokens, heads, qk_rope) at positions (tokens,) int32.

    Consecutive pairs are rotated ("interleaved"); ``beta_fast`` and ``beta_slow`` are the config's own, which differ
    within the family (1 and 1 for K2-Thinking, 32 and 1 from K2.5 on).
    """
    rope = config.rope
    yarn = YarnRoPE(
        dims=config.qk_rope_head_dim,
        traditional=True,
        base=rope.theta,
        scaling_factor=rope.factor,
        original_max_position_embeddings=rope.original_max_position_embeddings,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        mscale=rope.mscale,
        mscale_all_dim=rope.mscale_all_dim,
    )
    mx.eval(yarn._freqs)  # lazy until now: every layer of every step would compute them again

    def rotate(x: mx.array, positions: mx.array) -> mx.array:
        rotated: mx.array = yarn(x[:, :, None], offset=positions)  # each token is a batch of length 1
        return rotated.squeeze(2)

    return rotate
