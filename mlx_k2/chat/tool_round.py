"""Runs the tool calls of one reply, side by side. Knows neither the model nor what the tools do."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

from mlx_k2.chat.chat_events import CallEnded, CallStarted
from mlx_k2.text.tool_call import ToolCall
from mlx_k2.tools.outcome import Outcome, ToolResult

_LOOK_EVERY_S = 0.1

_TOO_MANY = ToolResult(Outcome.REFUSED, "The call was not run: no more tool calls are allowed. Answer without tools.")
_DECLINED = ToolResult(Outcome.DECLINED, "The user declined this call; it was not run.")
_STOPPED = ToolResult(Outcome.STOPPED, "The user stopped this call; what it has done is not known.")
_NOT_RUN = ToolResult(Outcome.STOPPED, "The user stopped before this call was run.")

Approve = Callable[[ToolCall], bool]
"""Whether the user wants a call to be run."""


class Tools(Protocol):
    """Tools to call; a ``mlx_k2.tools.toolbox.ToolBox``, which is not imported here because that takes a second."""

    @property
    def tools(self) -> Mapping[str, object]:
        """By name."""

    @property
    def declarations(self) -> list[dict[str, Any]]:
        """In OpenAI's format."""

    def start(self, name: str, arguments: Mapping[str, Any]) -> Future[ToolResult]:
        """Begin a call; cancelling it tells the tool to stop."""


def run_calls(
    calls: Sequence[ToolCall], tools: Tools, approve: Approve, stopped: Callable[[], bool], max_calls: int
) -> Generator[CallStarted | CallEnded, None, list[str]]:
    """Run ``calls``, at most ``max_calls`` of them; returns a text for each, in their order.

    Each is put to ``approve`` first, then all that may run do so at once. Once ``stopped``, those
    that still run are ended.
    """
    results: dict[int, ToolResult] = {}
    for index, call in enumerate(calls):
        early = _early_result(call, tools, approve, stopped, within_limit=index < max_calls)
        if early is not None:
            results[index] = early
            yield CallEnded(call, early, None)
    began = time.monotonic()
    running: dict[Future[ToolResult], int] = {}
    for index, call in enumerate(calls):
        if index not in results:
            assert call.values is not None, "a call without an error has its arguments"
            running[tools.start(call.name, call.values)] = index
            yield CallStarted(call)
    while running:
        done, _ = wait(running, timeout=_LOOK_EVERY_S, return_when=FIRST_COMPLETED)
        if stopped():
            done = set(running)
        for future in sorted(done, key=lambda future: running[future]):
            index = running.pop(future)
            results[index] = _STOPPED if not future.done() or future.cancelled() else future.result()
            future.cancel()
            yield CallEnded(calls[index], results[index], time.monotonic() - began)
    return [results[index].text for index in range(len(calls))]


def _early_result(
    call: ToolCall, tools: Tools, approve: Approve, stopped: Callable[[], bool], *, within_limit: bool
) -> ToolResult | None:
    """What a call comes to that is not run; None: it is to be run. A tool that is not there needs nobody's consent."""
    if call.error is not None:
        return ToolResult(Outcome.REFUSED, call.error)
    if not within_limit:
        return _TOO_MANY
    if stopped():
        return _NOT_RUN
    if call.name in tools.tools and not approve(call):
        return _NOT_RUN if stopped() else _DECLINED
    return None
