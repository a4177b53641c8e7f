"""Rules for every test: a skip states what it needs and how to get it, and on CI no test may be skipped."""

import os
import signal
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest
from hypothesis.database import DirectoryBasedExampleDatabase

# Set before a test module imports numpy or mlx, and inherited by every process that a test starts. Tests run in
# parallel, one for each core. More BLAS threads than cores make some tests ten times slower.
os.environ |= dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)

FIXED, LONG, FUZZ = "fixed", "long", "fuzz"
MANY_EXAMPLES = 2000
MAX_SLOW_FRACTION = 0.1
KEEP_FAILURES = (
    'To keep a failure: copy the arguments after "Falsifying example" into a decorator @example(...) of that test.',
    "It then runs in `make test`. Until then .hypothesis/examples keeps it, and the next `make fuzz` tries it first.",
)

# pytest-timeout limits each test. A deadline for each example would fail on a busy machine.
hypothesis.settings.register_profile(FIXED, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile(LONG, hypothesis.settings.get_profile(FIXED), max_examples=MANY_EXAMPLES)
hypothesis.settings.register_profile(
    FUZZ,
    deadline=None,
    derandomize=False,
    database=DirectoryBasedExampleDatabase(".hypothesis/examples"),
    max_examples=MANY_EXAMPLES,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(FIXED)  # --hypothesis-profile, read after this file, selects another

_NEEDS = "needs "
_not_run: Counter[str] = Counter()


@pytest.fixture(scope="session", autouse=True)
def _default_signal_handlers() -> Iterator[None]:
    """Reset SIGINT and SIGHUP to default handling for started processes: background jobs and nohup ignore them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a whole suite with more than MAX_SLOW_FRACTION slow tests, so that `make test` still runs nearly all."""
    num_slow = sum(item.get_closest_marker("slow") is not None for item in items)
    if config.args == config.getini("testpaths") and num_slow > MAX_SLOW_FRACTION * len(items):
        raise pytest.UsageError(
            f"{num_slow} of {len(items)} tests are marked slow: at most {MAX_SLOW_FRACTION:.0%} may be"
        )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the skipped tests by reason."""
    if report.skipped and isinstance(report.longrepr, tuple):
        _not_run[report.longrepr[2].removeprefix("Skipped: ")] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session if a test was skipped for a reason that does not start with _NEEDS, or for any reason on CI."""
    unexplained = [reason for reason in _not_run if not reason.startswith(_NEEDS)]
    if session.exitstatus == pytest.ExitCode.OK and (unexplained or (_not_run and os.environ.get("CI"))):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line for each reason of skipped tests and, after a failed fuzz run, how to keep a failure."""
    for reason, count in sorted(_not_run.items()):
        terminalreporter.write_line(f"not run here: {count} tests: {reason}", yellow=True)
    if hypothesis.settings.get_current_profile_name() == FUZZ and terminalreporter.stats.get("failed"):
        for line in KEEP_FAILURES:
            terminalreporter.write_line(line, yellow=True)
