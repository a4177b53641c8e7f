"""Concurrent execution of the tool calls of one reply. Knows neither the model nor what the tools do."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

from mlx_k2.chat.chat_events import CallEnded, CallStarted
from mlx_k2.text.tool_call import ToolCall
from mlx_k2.tools.outcome import Outcome, ToolResult

_STOP_POLL_S = 0.1

_OVER_LIMIT = ToolResult(Outcome.REFUSED, "The call was not run: no more tool calls are allowed. Answer without tools.")
_DECLINED_BY_USER = ToolResult(Outcome.DECLINED, "The user declined this call; it was not run.")
_STOPPED_WHILE_RUNNING = ToolResult(Outcome.STOPPED, "The user stopped this call; what it has done is not known.")
_STOPPED_BEFORE_RUN = ToolResult(Outcome.STOPPED, "The user stopped before this call was run.")

Approval = Callable[[ToolCall], bool]
"""Function that returns whether the user approves a call."""


class Tools(Protocol):
    """The methods of ``mlx_k2.tools.toolbox.ToolBox`` that a chat needs; importing ToolBox itself takes a second."""

    @property
    def tools(self) -> Mapping[str, object]:
        """The tools by name."""

    @property
    def declarations(self) -> list[dict[str, Any]]:
        """All tools in OpenAI's format."""

    def start(self, name: str, arguments: Mapping[str, Any]) -> Future[ToolResult]:
        """Start a call. Cancelling the future asks the tool to stop."""


def run_calls(
    calls: Sequence[ToolCall], tools: Tools, approve: Approval, is_stopped: Callable[[], bool], max_calls: int
) -> Generator[CallStarted | CallEnded, None, list[str]]:
    """Run at most ``max_calls`` of ``calls``; yield their events and return the text of each result, in order.

    First ``approve`` is called for each well-formed call of a known tool within the limit. All calls that are neither
    refused nor declined then run concurrently. When ``is_stopped`` returns True, or this generator is closed or raises,
    the calls that still run are cancelled.
    """
    results: dict[int, ToolResult] = {}
    for index, call in enumerate(calls):
        result = _result_without_run(call, tools, approve, is_stopped, is_within_limit=index < max_calls)
        if result is not None:
            results[index] = result
            yield CallEnded(call, result, None)
    started_at = time.monotonic()
    running_calls: dict[Future[ToolResult], int] = {}  # the index of the call of each future
    try:
        for index, call in enumerate(calls):
            if index not in results:
                assert call.values is not None, "a call without an error has its arguments"
                running_calls[tools.start(call.name, call.values)] = index
                yield CallStarted(call)
        while running_calls:
            ended_futures, _ = wait(running_calls, timeout=_STOP_POLL_S, return_when=FIRST_COMPLETED)
            if is_stopped():
                ended_futures = set(running_calls)
            for future in sorted(ended_futures, key=lambda future: running_calls[future]):
                index = running_calls.pop(future)
                has_result = future.done() and not future.cancelled()
                results[index] = future.result() if has_result else _STOPPED_WHILE_RUNNING
                future.cancel()
                yield CallEnded(calls[index], results[index], time.monotonic() - started_at)
    finally:
        for future in running_calls:
            future.cancel()
    return [results[index].text for index in range(len(calls))]


def _result_without_run(
    call: ToolCall, tools: Tools, approve: Approval, is_stopped: Callable[[], bool], *, is_within_limit: bool
) -> ToolResult | None:
    """Return the result of a call that must not run, else None.

    The user is not asked about a call of an unknown tool: the tools answer it with REFUSED.
    """
    if call.error is not None:
        return ToolResult(Outcome.REFUSED, call.error)
    if not is_within_limit:
        return _OVER_LIMIT
    if is_stopped():
        return _STOPPED_BEFORE_RUN
    if call.name in tools.tools and not approve(call):
        return _STOPPED_BEFORE_RUN if is_stopped() else _DECLINED_BY_USER  # stopped while ``approve`` asked
    return None
