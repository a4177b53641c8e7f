"""Tests of run_calls with a real tool server: no call goes on after the generator has ended."""

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
from tests.chat.test_chat_session import opened

DEADLINE_S = 30.0


@pytest.fixture(scope="module")
def tools() -> Iterator[ToolBox]:
    with opened(call_timeout_s=60) as box:
        yield box


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Return the files to which two hanging calls write their state."""
    return [tmp_path / "first", tmp_path / "second"]


def hanging_calls(files: list[Path]) -> list[ToolCall]:
    return [read_call("functions.hang_until_cancelled:0", json.dumps({"file": str(file)})) for file in files]


def wait_for(text: str, files: list[Path]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while others := [file for file in files if not file.exists() or file.read_text() != text]:
        assert time.monotonic() < deadline, f"these calls are not {text}: {others}"
        threading.Event().wait(0.02)


def test_a_closed_generator_cancels_its_calls(tools: ToolBox, files: list[Path]) -> None:
    events = run_calls(hanging_calls(files), tools, lambda call: True, lambda: False, max_calls=10)
    assert [type(next(events)) for _ in files] == [CallStarted] * 2
    wait_for("running", files)
    events.close()
    wait_for("cancelled", files)


def test_an_exception_while_calls_run_cancels_them(tools: ToolBox, files: list[Path]) -> None:
    def stopped() -> bool:
        if len(started) == 2:
            wait_for("running", files)
            raise KeyboardInterrupt
        return False

    started: list[CallStarted | CallEnded] = []
    with pytest.raises(KeyboardInterrupt):
        for event in run_calls(hanging_calls(files), tools, lambda call: True, stopped, max_calls=10):
            started.append(event)  # noqa: PERF402  # an exception would lose what list.extend has read
    wait_for("cancelled", files)


def test_a_call_that_cannot_be_started_cancels_those_before_it(tools: ToolBox, files: list[Path]) -> None:
    class OneCallOnly(ToolBox):
        num_calls = 0

        def start(self, name: str, arguments: Mapping[str, Any]) -> Future[ToolResult]:
            self.num_calls += 1
            if self.num_calls == 2:
                wait_for("running", files[:1])
                raise RuntimeError("no further call can be started")
            return super().start(name, arguments)

    box = OneCallOnly(tools._portal, tools.tools, tools._limits)
    with pytest.raises(RuntimeError, match="no further call"):
        list(run_calls(hanging_calls(files), box, lambda call: True, lambda: False, max_calls=10))
    wait_for("cancelled", files[:1])
