"""Rules for every test: it computes on MLX's CPU back end, and a skip states what it needs and how to get it.

On CI no test may be skipped, except those of the kinds that --may-lack names.
"""

import os
import signal
from collections import Counter
from collections.abc import Iterator

import hypothesis
import mlx.core as mx
import pytest
from hypothesis.database import DirectoryBasedExampleDatabase

# Set before a test module imports numpy, and inherited by every process that a test starts. Tests run side by side
# on all cores. More BLAS threads than cores make some tests ten times slower.
os.environ |= dict.fromkeys(
    ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1"
)

# Tests expect results of float32 on a CPU, also on a Mac. A stage that a test starts reads the variable.
os.environ["MLX_K2_DEVICE"] = "cpu"
mx.set_default_device(mx.cpu)

# The user's own defaults of options do not change a test.
os.environ["MLX_K2_CONFIG"] = os.devnull

FIXED, LONG, FUZZ = "fixed", "long", "fuzz"
MANY_EXAMPLES = 2000
MAX_SLOW_FRACTION = 0.1
HOW_TO_KEEP_A_FAILURE = (
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

_REASON_PREFIX = "needs "
KINDS = frozenset(
    {
        "emulated hosts",
        "tmux",
        "g++",
        "libclang",
        "NVRTC",
        "Linux",
        "/dev/full",
        "no Metal GPU",
        "no CUDA back end",
        "Kimi's vocabulary",
        "OpenAI's client 1.x",
    }
)
"""What a test may need and a machine may lack. The reason of a skip is "needs KIND: how to get it"."""
_num_skipped_by_reason: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that allows a machine to lack something on CI."""
    parser.addoption("--may-lack", default="", metavar="KIND,...", help="kinds of tests that CI may skip here")


def _may_lack(config: pytest.Config) -> set[str]:
    return {kind.strip() for kind in config.getoption("--may-lack").split(",") if kind.strip()}


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a kind that no test needs."""
    if unknown := sorted(_may_lack(config) - KINDS):
        raise pytest.UsageError(f"--may-lack {unknown[0]}: the kinds are {', '.join(sorted(KINDS))}")


def _skip_problems(config: pytest.Config) -> list[str]:
    """Return one line for each skip that is a failure, and for each kind in --may-lack that is not lacking."""
    kind_of = {reason: reason.removeprefix(_REASON_PREFIX).partition(":")[0] for reason in _num_skipped_by_reason}
    unknown = [reason for reason, kind in kind_of.items() if not reason.startswith(_REASON_PREFIX) or kind not in KINDS]
    problems = [f"a skip names no known kind: {reason}" for reason in sorted(unknown)]
    lacking = KINDS.intersection(kind_of.values())
    if os.environ.get("CI"):
        problems += [f"skipped on CI: {kind}" for kind in sorted(lacking - _may_lack(config))]
    is_whole_suite = _has_all_test_paths(config) and not (config.option.markexpr or config.option.keyword)
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist: it runs a part of the suite
    if is_whole_suite and not is_worker:
        problems += [f"--may-lack names what this machine has: {kind}" for kind in sorted(_may_lack(config) - lacking)]
    return problems


def _has_all_test_paths(config: pytest.Config) -> bool:
    test_paths: list[str] = config.getini("testpaths")
    return config.args == test_paths


@pytest.fixture(scope="session", autouse=True)
def _default_signal_handlers() -> Iterator[None]:
    """Reset an ignored SIGINT or SIGHUP, as of a background job or nohup, to its default for started processes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    for number, handler in handlers.items():
        if handler is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a whole suite with more than MAX_SLOW_FRACTION slow tests, so that `make test` still runs nearly all."""
    num_slow = sum(item.get_closest_marker("slow") is not None for item in items)
    if _has_all_test_paths(config) and num_slow > MAX_SLOW_FRACTION * len(items):
        raise pytest.UsageError(
            f"{num_slow} of {len(items)} tests are marked slow: at most {MAX_SLOW_FRACTION:.0%} may be"
        )


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the skipped tests by reason."""
    if report.skipped and isinstance(report.longrepr, tuple):
        _num_skipped_by_reason[report.longrepr[2].removeprefix("Skipped: ")] += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session for each of `_skip_problems`."""
    if session.exitstatus == pytest.ExitCode.OK and _skip_problems(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a line for each reason of skipped tests and, after a failed fuzz run, how to keep a failure."""
    for reason, count in sorted(_num_skipped_by_reason.items()):
        terminalreporter.write_line(f"not run here: {count} tests: {reason}", yellow=True)
    for problem in _skip_problems(terminalreporter.config):
        terminalreporter.write_line(problem, red=True)
    if hypothesis.settings.get_current_profile_name() == FUZZ and terminalreporter.stats.get("failed"):
        for line in HOW_TO_KEEP_A_FAILURE:
            terminalreporter.write_line(line, yellow=True)
