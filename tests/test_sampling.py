"""Tests of sampling parameters: values outside their ranges are refused, and generation_config.json is read."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.errors import RequestError
from mlx_k2.sampling import GenerationConfig, Sampling

RANGES: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    # accepted values, refused values
    "seed": ((0, 2**63 - 1), (-1, 2**63)),
    "temperature": ((0, 0.7, 10), (-0.1, 10.1, math.nan, math.inf)),
    "top_p": ((0.001, 1), (0, -0.1, 1.1, math.nan)),
    "top_k": ((1, 200_000), (0, -1)),
    "min_p": ((0, 0.99), (-0.1, 1, math.nan)),
    "repetition_penalty": ((0.5, 1, 10), (0, -1, 10.1, math.nan)),
    "num_logprobs": ((0, 100), (-1, 101)),
}
ACCEPTED = [(name, value) for name, (accepted, _) in RANGES.items() for value in accepted]
REFUSED = [(name, value) for name, (_, refused) in RANGES.items() for value in refused]


def sampling(**values: Any) -> Sampling:
    return Sampling(**({"seed": 1} | values))


@pytest.mark.parametrize(("name", "value"), ACCEPTED)
def test_a_value_within_its_range_is_accepted(name: str, value: float) -> None:
    assert getattr(sampling(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_a_value_out_of_range_is_refused_with_its_name_and_the_range(name: str, value: float) -> None:
    option = name.removeprefix("num_").replace("_", "-")
    with pytest.raises(RequestError, match=rf"^{option} {value} is out of range: give a value \S"):
        sampling(**{name: value})


@given(st.binary(max_size=40))
def test_any_generation_config_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        GenerationConfig.from_json(data)
    except RequestError as error:
        assert "generation_config.json cannot be read" in str(error)


def test_the_generation_config_is_read_and_unknown_keys_are_ignored() -> None:
    config = GenerationConfig.from_json(b'{"max_length": 262144, "temperature": 0.6, "eos_token_id": 163586}')
    assert (config.temperature, config.top_p, config.eos_token_ids) == (0.6, None, (163586,))


@pytest.mark.parametrize(("eos", "token_ids"), [(b"null", ()), (b"7", (7,)), (b"[7, 8]", (7, 8))])
def test_eos_token_id_may_be_null_one_token_or_a_list(eos: bytes, token_ids: tuple[int, ...]) -> None:
    assert GenerationConfig.from_json(b'{"eos_token_id": %s}' % eos).eos_token_ids == token_ids


def test_top_k_0_in_the_generation_config_turns_the_filter_off() -> None:
    assert GenerationConfig.from_json(b'{"top_k": 0}').top_k is None
    assert GenerationConfig.from_json(b'{"top_k": 40}').top_k == 40
