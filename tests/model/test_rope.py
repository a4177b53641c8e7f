"""Tests of the rotation: it equals YaRN's formula and mlx-lm's, for both values of beta_fast in the family."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx_lm.models.rope_utils import YarnRoPE
from numpy.typing import NDArray

from mlx_k2.config import ModelConfig
from mlx_k2.errors import ConfigError
from mlx_k2.model.rope import make_rope
from mlx_k2.weights.known_layout import thinking_config_fields
from tests.weights.tiny_checkpoints import config_of

THETA, FACTOR, ORIGINAL_POSITIONS, DIMS = 50000.0, 64.0, 4096, 64  # Kimi K2 Thinking's
FACTOR_FIELDS = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
NUMBERS = st.floats(1e-6, 1e6) | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 2).map(float)
POSITIONS = (0, 1, 5, 63, 4095, 4096, 100_000, 200_000)


def config_with(beta_fast: float, **scaling: float) -> ModelConfig:
    fields = thinking_config_fields()
    fields["rope_scaling"] |= {"beta_fast": beta_fast, **scaling}
    return config_of(fields)


def yarn_frequencies(beta_fast: float) -> NDArray[np.float64]:
    """Return each pair's frequency in radians per position: unchanged for fast pairs, divided by FACTOR for slow ones.

    Peng et al., arXiv 2309.00071, section 3.2: a ramp is between the pair that turns beta_fast times within the
    original context and the pair that turns beta_slow (1) times.
    """
    frequencies = THETA ** (-2 * np.arange(DIMS // 2) / DIMS)

    def pair_with(num_turns: float) -> float:
        return DIMS * math.log(ORIGINAL_POSITIONS / (num_turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = math.floor(pair_with(beta_fast)), math.ceil(pair_with(1.0))
    ramp = np.clip((np.arange(DIMS // 2) - low) / (high - low), 0, 1)
    return np.asarray(frequencies * (1 - ramp) + frequencies / FACTOR * ramp)


def measured_angles(config: ModelConfig, positions: tuple[int, ...]) -> NDArray[np.float64]:
    """Return the rotation of each pair at each position, in radians from -pi to pi: (positions, pairs)."""
    unit_vectors = mx.broadcast_to(mx.array([1.0, 0.0] * (DIMS // 2)), (len(positions), 1, DIMS))
    rotated = np.asarray(make_rope(config)(unit_vectors, mx.array(positions, mx.int32)), np.float64)[:, 0]
    return np.arctan2(rotated[:, 1::2], rotated[:, 0::2])


def test_yarn_frequencies_have_a_step_for_beta_fast_1_and_a_ramp_for_32() -> None:
    unscaled = THETA ** (-2 * np.arange(DIMS // 2) / DIMS)
    step, ramp = yarn_frequencies(1.0) / unscaled, yarn_frequencies(32.0) / unscaled
    first_slow, last_fast = 20, 8  # the pairs with 1 and with 32 turns: pair_with(1) is 19.2, pair_with(32) 8.9
    assert np.allclose(step[:first_slow], 1)
    assert np.allclose(step[first_slow:], 1 / FACTOR)
    assert np.allclose(ramp[: last_fast + 1], 1)
    assert np.allclose(ramp[first_slow:], 1 / FACTOR)
    assert np.all(np.diff(ramp[last_fast : first_slow + 1]) < 0)


@given(
    st.fixed_dictionaries(
        dict.fromkeys(("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "rope_theta"), NUMBERS)
        | {"original_max_position_embeddings": st.integers(-1, 10**10)}
    )
)
@example(dict.fromkeys(FACTOR_FIELDS, 1.0) | {"rope_theta": 1.001, "original_max_position_embeddings": 1})
@example(dict.fromkeys(FACTOR_FIELDS, 1e6) | {"rope_theta": 1e12, "original_max_position_embeddings": 10**9})
@example(dict.fromkeys(FACTOR_FIELDS, 0.0) | {"rope_theta": 1.0, "original_max_position_embeddings": 1})
def test_each_yarn_config_is_refused_or_gives_a_rotation_and_a_finite_softmax_scale(scaling: dict[str, float]) -> None:
    fields = thinking_config_fields()
    fields["rope_scaling"] |= scaling
    try:
        config = config_of(fields)
    except ConfigError:
        return
    make_rope(config)
    assert math.isfinite(config.softmax_scale)


@pytest.mark.parametrize("beta_fast", [1.0, 32.0])
def test_consecutive_pairs_rotate_by_position_times_frequency(beta_fast: float) -> None:
    expected = np.outer(POSITIONS, yarn_frequencies(beta_fast))
    difference = measured_angles(config_with(beta_fast), POSITIONS) - expected
    difference -= np.round(difference / (2 * math.pi)) * 2 * math.pi
    assert np.all(np.abs(difference) < 1e-6 + 4e-7 * expected)  # float32 rounding grows with the position


@pytest.mark.parametrize("beta_fast", [1.0, 32.0])
@pytest.mark.parametrize("mscale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_rotation_has_the_same_bits_as_mlx_lms(beta_fast: float, mscale: float, dtype: mx.Dtype) -> None:
    mlx_lm_rope = YarnRoPE(
        DIMS,
        traditional=True,
        base=THETA,
        scaling_factor=FACTOR,
        original_max_position_embeddings=ORIGINAL_POSITIONS,
        beta_fast=beta_fast,
        mscale=mscale,
        mscale_all_dim=1.0,
    )
    x = mx.random.normal((len(POSITIONS), 3, DIMS), dtype, key=mx.random.key(2))
    positions = mx.array(POSITIONS, mx.int32)
    expected = mlx_lm_rope(x[:, :, None], offset=positions).squeeze(2)
    assert mx.array_equal(make_rope(config_with(beta_fast, mscale=mscale))(x, positions), expected)


def test_rope_keeps_vector_lengths_when_both_mscales_are_equal_and_scales_them_otherwise() -> None:
    x = mx.random.normal((3, 2, DIMS), key=mx.random.key(0))
    positions = mx.array([0, 7, 200_000], mx.int32)
    half_mscale_ratio = (0.1 * 0.5 * math.log(FACTOR) + 1) / (0.1 * 1.0 * math.log(FACTOR) + 1)
    for mscale, expected_ratio in ((1.0, 1.0), (0.5, half_mscale_ratio)):  # mscale_all_dim is 1
        rotated = make_rope(config_with(1.0, mscale=mscale))(x, positions)
        ratio = np.linalg.norm(np.asarray(rotated), axis=-1) / np.linalg.norm(np.asarray(x), axis=-1)
        assert np.allclose(ratio, expected_ratio, rtol=1e-5)


def test_a_token_rotates_only_by_its_own_position() -> None:
    rotate = make_rope(config_with(1.0))
    x = mx.random.normal((4, 3, DIMS), key=mx.random.key(1))
    positions = mx.array([9, 2, 4000, 9], mx.int32)
    rotated = rotate(x, positions)
    for index in range(4):
        some = slice(index, index + 1)
        assert mx.array_equal(rotated[some], rotate(x[some], positions[some]))
