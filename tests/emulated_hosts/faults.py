"""A fault while two streams run on three stages over ssh: its actions, its outcome, and the checks of the outcome."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.emulated_hosts.fault_run import FaultSetup, StreamsRun
from tests.emulated_hosts.hosts import wait_until

Tokens = tuple[list[int], ...]


class Outcome:
    """The expected outcomes of a run, as docs/reliability.md shows them."""

    UNNOTICED = "no restart, same tokens"
    RESTARTED = "same tokens after a restart"
    ENDED = "fails and names the host; no wrong token"
    GONE = "no process is left on any host after 5 s"


@dataclass(frozen=True)
class Fault:
    """One row of the matrix. ``prepare``, ``cause`` and ``after`` are actions, as fault_actions.py describes them."""

    name: str
    cause: Callable[[FaultSetup, StreamsRun], float | None]
    outcome: str
    reasons: tuple[str, ...] = ()
    """A pattern for the reason of each restart and for the final error. The last pattern is for the fault ``name``."""
    within_s: float | None = None
    """Time limit for the detection of the fault."""
    phase: str = "decode"
    """The phase of the first start in which ``cause`` is called."""
    prepare: Callable[[FaultSetup], None] = lambda _: None
    after: Callable[[FaultSetup, StreamsRun], None] = lambda *_: None
    options: dict[str, object] = field(default_factory=dict)
    """Options of two_streams.py, without ``halts``."""
    halts: dict[str, int] = field(default_factory=dict)
    """The phases in which the run halts, see two_streams.py."""
    end_timeout_s: float = 6.0
    """Time limit for the end of all processes on the hosts."""


@dataclass(frozen=True)
class Finding:
    """The result of one row. ``detected_s`` is the time from the fault to the last reported reason, ``reason``."""

    fault: Fault
    detected_s: float | None
    reason: str
    wall_s: float


def try_fault(fault: Fault, setup: FaultSetup, expected: Tokens, times_slower: float = 1.0) -> Finding:
    """Cause a fault and check its outcome. All time limits are multiplied by ``times_slower``, for a busy machine."""
    started_at = time.monotonic()
    fault.prepare(setup)
    run = setup.start({**fault.options, "halts": fault.halts})
    try:
        run.until(phase=fault.phase, start=1)
        fault_at = fault.cause(setup, run) or time.monotonic()
        if fault.outcome != Outcome.GONE:
            run.finish()
        fault.after(setup, run)
        _check_outcome(fault, run, expected)
        _check_reasons(fault, run)
        detected_s = run.reason_times[-1] - fault_at if run.reasons else None
        if fault.within_s is not None:
            assert detected_s is not None and detected_s < times_slower * fault.within_s, f"after {detected_s} s"
        if run.reasons:
            _check_report(setup, run)
        processes = setup.hosts.all_processes
        assert wait_until(lambda: not processes(), times_slower * fault.end_timeout_s), f"still running: {processes()}"
    finally:
        setup.close()
    return Finding(fault, detected_s, run.reasons[-1] if run.reasons else "", time.monotonic() - started_at)


def _check_outcome(fault: Fault, run: StreamsRun, expected: Tokens) -> None:
    is_complete = fault.outcome in (Outcome.UNNOTICED, Outcome.RESTARTED)
    for tokens, answer in zip(run.tokens, expected, strict=True):
        assert tokens == (answer if is_complete else answer[: len(tokens)]), f"other tokens; {run.reasons}"
    if is_complete:
        assert run.process.returncode == 0 and run.lines[-1] == {"ended": True}, (run.reasons, run.lines[-1])
    if fault.outcome == Outcome.ENDED:
        assert run.process.returncode == 1 and "error" in run.lines[-1], run.lines[-1]


def _check_reasons(fault: Fault, run: StreamsRun) -> None:
    assert len(run.reasons) == len(fault.reasons), run.reasons
    for reason, pattern in zip(run.reasons, fault.reasons, strict=True):
        assert re.match(pattern, reason), f"{reason!r} is not {pattern!r}"
        named_stages = re.findall(r"stage (\d) on host-(\d)", reason)
        expected_stages = re.findall(r"stage (\d) on host-(\d)", pattern)
        assert set(named_stages) <= set(expected_stages), f"{reason!r} names another stage"


def _check_report(setup: FaultSetup, run: StreamsRun) -> None:
    report = setup.report()
    reason = run.reasons[-1].partition(" (given up after")[0]
    assert reason in report, f"{reason!r} is not in the report"
    assert "\n== versions\nmlx-k2 " in report and "== last lines of stage" in report
    if len(run.reasons) == 1 and "error" not in run.lines[-1]:  # a fault in a step, when each stage has a status
        lines = report.partition("== status of the stages at the fault\n")[2].splitlines()[:3]
        assert [line.partition(" (")[0] for line in lines] == [f"stage {rank} on host-{rank}" for rank in range(3)]
        assert '"step": ' in report and '"tokens": ' in report
