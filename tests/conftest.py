"""What holds for every test: a skip says what it needs and how to get it, and on CI nothing may be missing."""

import os
import signal
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest

# Each test has pytest's deadline; hypothesis's own, for each example, would fail on a busy machine.
hypothesis.settings.register_profile("no deadline for an example", deadline=None)
hypothesis.settings.load_profile("no deadline for an example")

_NEEDS = "needs "
_not_run: Counter[str] = Counter()


@pytest.fixture(scope="session", autouse=True)
def _signals_as_usual() -> Iterator[None]:
    """A process started here heeds SIGINT and SIGHUP, also where these tests run in the background or under nohup."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count what was skipped, by reason."""
    if report.skipped and isinstance(report.longrepr, tuple):
        _not_run[report.longrepr[2].removeprefix("Skipped: ")] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where a test was skipped without saying what it needs, or at all on CI."""
    unexplained = [reason for reason in _not_run if not reason.startswith(_NEEDS)]
    if session.exitstatus == pytest.ExitCode.OK and (unexplained or (_not_run and os.environ.get("CI"))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each kind of test that this machine could not run."""
    for reason, count in sorted(_not_run.items()):
        terminalreporter.write_line(f"not run here: {count} tests: {reason}", yellow=True)
