"""Tests of run_calls with a real tool server: no call runs on after its generator has ended."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.chat.chat_events import CallEnded, CallStarted
from mlx_k2.chat.tool_round import run_calls
from mlx_k2.text.tool_call import ToolCall, read_call
from mlx_k2.tools.outcome import ToolResult
from mlx_k2.tools.toolbox import ToolBox
from tests.chat.test_chat_session import open_test_tools

DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def tools() -> Iterator[ToolBox]:
    with open_test_tools(call_timeout_s=60) as box:
        yield box


@pytest.fixture
def state_files(tmp_path: Path) -> list[Path]:
    """Return the files to which two calls of hang_until_cancelled write their state: running, then cancelled."""
    return [tmp_path / "first", tmp_path / "second"]


def hanging_calls(state_files: list[Path]) -> list[ToolCall]:
    return [read_call("functions.hang_until_cancelled:0", json.dumps({"file": str(file)})) for file in state_files]


def wait_for_state(state: str, state_files: list[Path]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while others := [file for file in state_files if not file.exists() or file.read_text() != state]:
        assert time.monotonic() < deadline, f"these calls are not {state}: {others}"
        threading.Event().wait(0.02)


def test_a_closed_generator_cancels_its_calls(tools: ToolBox, state_files: list[Path]) -> None:
    events = run_calls(hanging_calls(state_files), tools, lambda call: True, lambda: False, max_calls=10)
    assert [type(next(events)) for _ in state_files] == [CallStarted] * 2
    wait_for_state("running", state_files)
    events.close()
    wait_for_state("cancelled", state_files)


def test_an_exception_while_calls_run_cancels_them(tools: ToolBox, state_files: list[Path]) -> None:
    def is_stopped() -> bool:
        if len(events) == 2:  # both calls have been started
            wait_for_state("running", state_files)
            raise KeyboardInterrupt
        return False

    events: list[CallStarted | CallEnded] = []
    with pytest.raises(KeyboardInterrupt):
        for event in run_calls(hanging_calls(state_files), tools, lambda call: True, is_stopped, max_calls=10):
            events.append(event)  # noqa: PERF402  # list.extend would lose its events when the exception is raised
    wait_for_state("cancelled", state_files)


def test_a_call_that_cannot_be_started_cancels_the_calls_before_it(tools: ToolBox, state_files: list[Path]) -> None:
    class OneCallToolBox(ToolBox):
        num_started = 0

        def start(self, name: str, arguments: Mapping[str, Any]) -> Future[ToolResult]:
            self.num_started += 1
            if self.num_started == 2:
                wait_for_state("running", state_files[:1])
                raise RuntimeError("no further call can be started")
            return super().start(name, arguments)

    box = OneCallToolBox(tools._portal, tools.tools, tools._limits)
    with pytest.raises(RuntimeError, match="no further call"):
        list(run_calls(hanging_calls(state_files), box, lambda call: True, lambda: False, max_calls=10))
    wait_for_state("cancelled", state_files[:1])
