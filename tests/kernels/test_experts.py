"""Tests of the choice of a kernel by device, check and number of tokens, and of cached checks."""

import logging
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_k2.kernels import check_cache, experts, reference
from mlx_k2.kernels.layer_time import Layer, Timing
from mlx_k2.kernels.self_check import BATCH, DECODE, PREFILL, ROUTER, KernelCheck, LayerShape
from mlx_k2.kernels.tuning import DEFAULT
from tests.advice import follows_advice
from tests.metal_cpu.float64 import random_case

pytestmark = pytest.mark.timeout(30)

ROOT = Path(__file__).parents[2]
SHAPE = LayerShape(hidden_size=64, intermediate_size=32, top_k=4, dtype=mx.bfloat16)


def test_without_a_gpu_the_reference_runs_and_no_kernel_is_checked() -> None:
    case = random_case(experts=4, tokens=3, top_k=2, hidden=64, intermediate=32, dtype=mx.float32)
    with mx.stream(mx.cpu):
        assert mx.array_equal(experts.routed_experts(*case), reference.routed_experts(*case)).item()
        assert experts.warnings_for(SHAPE) == ()


@pytest.mark.parametrize(
    ("tokens", "kernel", "token_range"),
    [
        (1, DECODE, DECODE),
        (2, BATCH, BATCH),
        (16, BATCH, BATCH),
        (17, PREFILL, experts.SHORT),
        (191, PREFILL, experts.SHORT),
        (192, PREFILL, experts.LONG),
        (4096, PREFILL, experts.LONG),
    ],
)
def test_kernel_for_chooses_by_the_number_of_tokens(tokens: int, kernel: str, token_range: str) -> None:
    choice = experts.kernel_for(tokens)
    assert (choice.kernel, choice.token_range) == (kernel, token_range)
    # each range is timed with a number of tokens within it
    assert experts.kernel_for(experts.TIMED_TOKENS[token_range]).token_range == token_range


def test_stored_kernel_checks_are_loaded_again(tmp_path: Path) -> None:
    path = check_cache.cache_path(tmp_path / "new", SHAPE, "Apple M9")
    cached = check_cache.CachedChecks(
        [KernelCheck(DECODE, usable=True, error=1e-3, slower=(DECODE,)), KernelCheck(BATCH, usable=False, reason="no")],
        tuning=DEFAULT,
        started={PREFILL: 1},
    )
    assert check_cache.load(path) is None
    check_cache.store(path, cached)
    assert check_cache.load(path) == cached


def test_the_cache_path_depends_on_chip_shape_kernel_text_and_macos_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [
        check_cache.cache_path(tmp_path, SHAPE, "Apple M9"),
        check_cache.cache_path(tmp_path, SHAPE, "Apple M8"),
        check_cache.cache_path(tmp_path, SHAPE._replace(top_k=8), "Apple M9"),
        check_cache.cache_path(tmp_path, SHAPE._replace(dtype=mx.float32), "Apple M9"),
    ]
    monkeypatch.setattr(check_cache, "metal_texts", lambda: ["another text"])
    paths.append(check_cache.cache_path(tmp_path, SHAPE, "Apple M9"))
    monkeypatch.setattr(check_cache, "macos_build", lambda: "25C56")
    paths.append(check_cache.cache_path(tmp_path, SHAPE, "Apple M9"))
    paths.append(check_cache.cache_path(tmp_path, SHAPE._replace(num_experts=384), "Apple M9"))
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"checks": [{"kernel": 1}], "tuning": null}', "[]"])
def test_an_unreadable_cache_file_loads_as_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "checks.json"
    path.write_text(content)
    assert check_cache.load(path) is None


def test_storing_checks_in_an_unwritable_directory_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_cache.store(tmp_path / "file" / "checks.json", check_cache.CachedChecks([], None))


class FakeMachine:
    """A machine with a GPU, whose checks run no kernel and have the given outcomes."""

    def __init__(self) -> None:
        self.outcomes: dict[str, KernelCheck | type[BaseException]] = {}  # of checks; other kernels pass theirs
        self.checked: list[str] = []  # kernels, in the order of their checks
        self.slower: tuple[str, ...] = ()  # token ranges in which plain MLX is faster

    def check(self, name: str, *_: object) -> KernelCheck:
        self.checked.append(name)
        outcome = self.outcomes.get(name, KernelCheck(name, usable=True))
        if isinstance(outcome, KernelCheck):
            return outcome
        raise outcome


class ProcessEnded(BaseException):
    """The end of the process that makes a check."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    fake = FakeMachine()
    monkeypatch.setattr(experts, "_backend_kernels", lambda: experts.METAL_KERNELS)
    monkeypatch.setattr(experts, "check_kernel", fake.check)
    monkeypatch.setattr(experts, "slower_token_ranges", lambda *_: fake.slower)
    monkeypatch.setattr(experts, "_adopted", {})
    return fake


def checks_by_kernel(directory: Path, *, again: bool = False) -> dict[str, KernelCheck]:
    """Return the checks of routed experts, for SHAPE: the router's shape has no intermediate size."""
    return {check.kernel: check for check in experts.checks(SHAPE, directory, again=again).checks}


def test_a_wrong_and_a_refused_kernel_are_logged_once_and_not_checked_again(
    machine: FakeMachine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine.outcomes = {
        DECODE: KernelCheck(DECODE, usable=False, reason="off by 5e-01", error=0.5),
        BATCH: KernelCheck(BATCH, usable=False, reason="[metal::Device] Unable to build metal library from source"),
    }
    with caplog.at_level(logging.WARNING):
        first, second = checks_by_kernel(tmp_path), checks_by_kernel(tmp_path)
    assert first == second
    assert machine.checked == [DECODE, BATCH, PREFILL]
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        f"the {name} kernel is not used here" for name in (DECODE, BATCH)
    ]
    assert first[DECODE].warning.endswith("plain MLX runs instead; `mlx-k2 kernels` there checks it again")


def test_a_check_whose_process_ended_twice_is_not_made_again(machine: FakeMachine, tmp_path: Path) -> None:
    machine.outcomes = {DECODE: ProcessEnded}
    for _ in range(2):
        with pytest.raises(ProcessEnded):
            checks_by_kernel(tmp_path)
    third = checks_by_kernel(tmp_path)
    assert machine.checked == [DECODE, DECODE, BATCH, PREFILL]
    assert third[DECODE] == KernelCheck(DECODE, usable=False, reason="2 checks did not finish")
    assert third[BATCH].usable


def test_a_check_that_finished_at_the_second_try_has_no_unfinished_start(machine: FakeMachine, tmp_path: Path) -> None:
    machine.outcomes = {DECODE: ProcessEnded}
    with pytest.raises(ProcessEnded):
        checks_by_kernel(tmp_path)
    machine.outcomes = {}
    assert checks_by_kernel(tmp_path)[DECODE].usable
    cached = check_cache.load(check_cache.cache_path(tmp_path, SHAPE, experts.chip()))
    assert cached is not None
    assert cached.started == {}


def test_after_a_temporary_fault_a_kernel_is_checked_again_at_the_next_start(
    machine: FakeMachine, tmp_path: Path
) -> None:
    fault = KernelCheck(
        DECODE, usable=False, reason="[METAL] Command buffer execution failed: Insufficient Memory", is_temporary=True
    )
    machine.outcomes = {DECODE: fault}
    assert checks_by_kernel(tmp_path)[DECODE] == fault
    assert fault.warning.endswith("the next start checks it again")
    machine.outcomes = {}
    assert checks_by_kernel(tmp_path)[DECODE].usable
    assert machine.checked == [DECODE, BATCH, PREFILL, DECODE]


@follows_advice("`mlx-k2 kernels` there checks it again")
def test_after_a_new_macos_build_and_with_again_every_kernel_is_checked_anew(
    machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.outcomes = {BATCH: KernelCheck(BATCH, usable=False, reason="off", error=0.5)}
    assert not checks_by_kernel(tmp_path)[BATCH].usable
    machine.outcomes = {}
    assert not checks_by_kernel(tmp_path)[BATCH].usable
    assert checks_by_kernel(tmp_path, again=True)[BATCH].usable
    monkeypatch.setattr(check_cache, "macos_build", lambda: "25C56")
    machine.checked.clear()
    checks_by_kernel(tmp_path)
    assert machine.checked == [DECODE, BATCH, PREFILL]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"checks": [], "tuning": null, "started": {"decode": "x"}}'])
def test_a_corrupt_cache_file_is_written_anew(machine: FakeMachine, tmp_path: Path, content: str) -> None:
    path = check_cache.cache_path(tmp_path, SHAPE, experts.chip())
    path.write_text(content)
    assert all(check.usable for check in checks_by_kernel(tmp_path).values())
    cached = check_cache.load(path)
    assert cached is not None
    assert {check.kernel for check in cached.checks} == {DECODE, BATCH, PREFILL}


def test_a_kernel_is_not_used_for_the_numbers_of_tokens_for_which_plain_mlx_is_faster(
    machine: FakeMachine, tmp_path: Path
) -> None:
    machine.slower = (experts.LONG,)
    experts.adopt(SHAPE, experts.checks(SHAPE, tmp_path))
    assert experts.usable(SHAPE).token_ranges == {DECODE, BATCH, experts.SHORT}
    assert experts.usable(SHAPE).warnings == ()


def test_the_faster_of_kernel_and_plain_mlx_is_found_by_timing_both(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[tuple[str, int]] = []

    def time_layer(layer: Layer, _stack: object, tokens: int, _top_k: int, **_: int) -> Timing:
        name = "plain" if layer is reference.routed_experts else "kernel"
        timed.append((name, tokens))
        faster = "plain" if tokens == experts.TIMED_TOKENS[experts.LONG] else "kernel"
        return Timing(seconds=1.0 if name == faster else 2.0, bytes_needed=1)

    monkeypatch.setattr(experts, "time_layer", time_layer)
    assert experts.slower_token_ranges(PREFILL, SHAPE) == (experts.LONG,)
    assert timed == [("plain", 64), ("kernel", 64), ("plain", 2048), ("kernel", 2048)]
    assert experts.slower_token_ranges(ROUTER, SHAPE) == ()


def test_a_kernel_without_a_result_is_not_used(machine: FakeMachine) -> None:
    experts.adopt(SHAPE, check_cache.CachedChecks([KernelCheck(DECODE, usable=True)], None))
    assert experts.usable(SHAPE).token_ranges == {DECODE}
    assert [warning.split(";")[0] for warning in experts.usable(SHAPE).warnings] == [
        f"the {name} kernel is not used here (its check did not finish)" for name in (BATCH, PREFILL)
    ]
    assert machine.checked == []


def test_two_processes_that_start_together_check_each_kernel_once(tmp_path: Path) -> None:
    """Start two processes. The one that gets the lock makes slow checks; the other one finds the results."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from mlx_k2.kernels import experts\n"
        "from mlx_k2.kernels.self_check import KernelCheck\n"
        "from tests.kernels.test_experts import SHAPE\n"
        "def check(name, *_):\n"
        "    print(name, flush=True)\n"
        "    time.sleep(0.3)\n"
        "    return KernelCheck(name, usable=True)\n"
        "experts._backend_kernels = lambda: experts.METAL_KERNELS\n"
        "experts.check_kernel, experts.slower_token_ranges = check, lambda *_: ()\n"
        "checks = experts.checks(SHAPE, Path(sys.argv[1])).checks\n"
        "assert [check.kernel for check in checks if check.usable] == ['decode', 'batch', 'prefill']\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)]
    checked = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(checked) == [[], [DECODE, BATCH, PREFILL]]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=["bfloat16", "float32"])
def test_each_unused_kernel_causes_a_warning_and_the_reference_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype
) -> None:
    """Without a GPU each check fails, as on a Mac whose compiler refuses the kernel's text."""
    monkeypatch.setattr(experts, "_backend_kernels", lambda: experts.METAL_KERNELS)
    monkeypatch.setattr(check_cache, "DEFAULT_DIRECTORY", tmp_path)
    monkeypatch.setattr(experts, "_adopted", {})
    warnings = experts.warnings_for(SHAPE._replace(dtype=dtype))
    assert all("plain MLX runs instead" in warning for warning in warnings)
    # one for each of the 4 kernels, or one for the router and one for all kernels of experts
    assert len(warnings) == (4 if dtype == mx.bfloat16 else 2)
    case = random_case(experts=4, tokens=3, top_k=2, hidden=64, intermediate=32, dtype=mx.float32)
    assert mx.array_equal(experts.routed_experts(*case), reference.routed_experts(*case)).item()
