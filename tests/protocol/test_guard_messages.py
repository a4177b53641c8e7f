"""Tests of GuardSettings and StageExit: they round-trip through JSON, and invalid ones are refused."""

import signal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_k2.errors import ProtocolError
from mlx_k2.protocol.guard_messages import GuardSettings, StageExit, kill_after_s


def test_kill_after_s_is_5_s_plus_1_s_for_each_10_gb() -> None:
    assert kill_after_s(0) == 5
    assert kill_after_s(300 * 10**9) == 35


@given(st.floats(0.1, 1e6), st.integers(0, 10**13), st.lists(st.text().map("NAME={}".format)))
def test_guard_settings_round_trip_through_json(lease_s: float, held_bytes: int, lines: list[str]) -> None:
    settings = GuardSettings(lease_s, held_bytes, tuple(lines))
    assert GuardSettings.from_json(settings.to_json()) == settings


def test_a_return_code_becomes_an_exit_code_or_a_signal() -> None:
    assert StageExit.from_returncode(3, "why") == StageExit(exit_code=3, signal=None, reason="why")
    killed = StageExit.from_returncode(-signal.SIGKILL, "why")
    assert killed == StageExit(exit_code=None, signal=signal.SIGKILL, reason="why")
    assert StageExit.from_json(killed.to_json()) == killed
    assert StageExit.from_returncode(None, "why") == StageExit(exit_code=None, signal=None, reason="why")


@given(st.binary(max_size=60) | st.sampled_from([b"[]", b"{}", b'{"lease_s": -1, "held_bytes": 0}', b"1e999"]))
@example(b'{"lease_s": -1, "held_bytes": 0, "environment": []}')  # out of range
@example(b'{"lease_s": 1, "held_bytes": 0, "environment": ["NAME"]}')  # without a value
def test_invalid_guard_settings_and_stage_exits_are_refused(payload: bytes) -> None:
    for payload_type in (GuardSettings, StageExit):
        with pytest.raises(ProtocolError):
            payload_type.from_json(payload)
