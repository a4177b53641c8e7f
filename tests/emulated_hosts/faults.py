"""One fault: the actions on three stages with two streams over ssh, and the checks after it."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.emulated_hosts.fault_run import FaultSetup, StreamsRun
from tests.emulated_hosts.hosts import wait_until

Tokens = tuple[list[int], ...]


class Outcome:
    """Expected outcomes of a run."""

    UNNOTICED = "goes on, no restart"
    RESTARTED = "same tokens after a restart"
    ENDED = "fails and names the host; the tokens so far are right"
    GONE = "no process is left on any host after 5 s"


@dataclass(frozen=True)
class Fault:
    """One row. ``cause`` is called in ``phase`` and returns when the fault began, or None if at its return.

    ``reasons`` are patterns of the restarts' reasons and of the final error, one for each. The last is of this fault.
    """

    name: str
    cause: Callable[[FaultSetup, StreamsRun], float | None]
    outcome: str
    reasons: tuple[str, ...] = ()
    within_s: float | None = None
    phase: str = "decode"
    at: int = 1
    prepare: Callable[[FaultSetup], None] = lambda _: None
    after: Callable[[FaultSetup, StreamsRun], None] = lambda *_: None
    options: dict[str, object] = field(default_factory=dict)
    halts: dict[str, int] = field(default_factory=dict)
    left_s: float = 6.0


@dataclass(frozen=True)
class Finding:
    """Result of one row. ``reason`` is the last one reported, ``detected_s`` the time from the fault to that report."""

    fault: Fault
    detected_s: float | None
    reason: str
    wall_s: float


def try_fault(fault: Fault, setup: FaultSetup, expected: Tokens, times_slower: float = 1.0) -> Finding:
    """Cause the fault and assert all that must hold. ``times_slower`` scales the time limits on a busy machine."""
    began = time.monotonic()
    fault.prepare(setup)
    run = setup.start({**fault.options, "halts": fault.halts})
    try:
        run.until(phase=fault.phase, time=fault.at)
        broken_at = fault.cause(setup, run) or time.monotonic()
        if fault.outcome != Outcome.GONE:
            run.finish()
        fault.after(setup, run)
        _check_outcome(fault, run, expected)
        detected_s, reason = (run.recorded[-1][0] - broken_at, run.recorded[-1][1]) if run.recorded else (None, "")
        _check_reasons(fault, run)
        _check_time(fault, detected_s, times_slower)
        if run.reasons:
            _check_report(setup, run)
        left = setup.hosts.all_processes
        assert wait_until(lambda: not left(), times_slower * fault.left_s), f"left over: {left()}"
    finally:
        setup.close()
    return Finding(fault, detected_s, reason, time.monotonic() - began)


def _check_outcome(fault: Fault, run: StreamsRun, expected: Tokens) -> None:
    whole = fault.outcome in (Outcome.UNNOTICED, Outcome.RESTARTED)
    for tokens, right in zip(run.tokens, expected, strict=True):
        assert tokens == (right if whole else right[: len(tokens)]), f"the tokens are not the same; {run.reasons}"
    if whole:
        assert run.process.returncode == 0 and run.lines[-1] == {"ended": True}, (run.reasons, run.lines[-1])
    if fault.outcome == Outcome.ENDED:
        assert run.process.returncode == 1 and "error" in run.lines[-1], run.lines[-1]


def _check_reasons(fault: Fault, run: StreamsRun) -> None:
    assert len(run.reasons) == len(fault.reasons), run.reasons
    for reason, pattern in zip(run.reasons, fault.reasons, strict=True):
        assert re.match(pattern, reason), f"{reason!r} is not {pattern!r}"
        named = re.findall(r"stage (\d) on host-(\d)", reason)
        meant = re.findall(r"stage (\d) on host-(\d)", pattern)
        assert named[0] in meant and set(named) <= set(meant), f"others are blamed in {reason!r}"


def _check_time(fault: Fault, detected_s: float | None, times_slower: float) -> None:
    if fault.within_s is not None:
        assert detected_s is not None and detected_s < times_slower * fault.within_s, f"noticed after {detected_s} s"


def _check_report(setup: FaultSetup, run: StreamsRun) -> None:
    report = setup.report()
    reason = run.reasons[-1].partition(" (given up after")[0]
    assert reason in report, f"{reason!r} is not in the report"
    assert "\n== versions\nmlx-k2 " in report and "== last lines of stage" in report
    if len(run.reasons) == 1 and "error" not in run.lines[-1]:
        status = report.partition("== status of the stages at the fault\n")[2].splitlines()[:3]
        assert [line.partition(" (")[0] for line in status] == [f"stage {i} on host-{i}" for i in range(3)], status
        assert '"step": ' in report and '"tokens": ' in report
