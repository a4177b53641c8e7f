"""Concurrent execution of the tool calls of one reply. Knows neither the model nor what the tools do."""

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
"""A function that returns whether the user approves a call."""


class Tools(Protocol):
    """Tools to call, as in ``mlx_k2.tools.toolbox.ToolBox``, which is not imported here because that takes a second."""

    @property
    def tools(self) -> Mapping[str, object]:
        """The tools by name."""

    @property
    def declarations(self) -> list[dict[str, Any]]:
        """All tools in OpenAI's format."""

    def start(self, name: str, arguments: Mapping[str, Any]) -> Future[ToolResult]:
        """Start a call. Cancelling the future asks the tool to stop."""


def run_calls(
    calls: Sequence[ToolCall], tools: Tools, approve: Approve, stopped: Callable[[], bool], max_calls: int
) -> Generator[CallStarted | CallEnded, None, list[str]]:
    """Run ``calls``, at most ``max_calls`` of them; yield their events and return a text for each, in their order.

    ``approve`` is called first, for each well-formed call of a known tool within the limit. All calls that are not
    refused then run concurrently. When ``stopped`` returns True, or this generator is closed or raises, the calls that
    still run are cancelled.
    """
    results: dict[int, ToolResult] = {}
    for index, call in enumerate(calls):
        early = _early_result(call, tools, approve, stopped, within_limit=index < max_calls)
        if early is not None:
            results[index] = early
            yield CallEnded(call, early, None)
    began = time.monotonic()
    running: dict[Future[ToolResult], int] = {}
    try:
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
    finally:
        for future in running:
            future.cancel()
    return [results[index].text for index in range(len(calls))]


def _early_result(
    call: ToolCall, tools: Tools, approve: Approve, stopped: Callable[[], bool], *, within_limit: bool
) -> ToolResult | None:
    """Return the result of a call that must not run, else None. A call of an unknown tool needs no approval."""
    if call.error is not None:
        return ToolResult(Outcome.REFUSED, call.error)
    if not within_limit:
        return _TOO_MANY
    if stopped():
        return _NOT_RUN
    if call.name in tools.tools and not approve(call):
        return _NOT_RUN if stopped() else _DECLINED
    return None
