"""Tests of conftest.py's rules for skipped tests, on a small suite that runs in one process or in two workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS_TMUX = "needs tmux: apt install tmux"
SUITE = """
import pytest

@pytest.mark.parametrize("number", range(4))
def test_skipped(number):
    pytest.skip({reason!r})

def test_passed():
    pass
"""
pytestmark = pytest.mark.slow
in_one_process_and_in_workers = pytest.mark.parametrize("workers", ["0", "2"])


def run_suite(folder: Path, reason: str, *arguments: str, workers: str, ci: str) -> subprocess.CompletedProcess[str]:
    """Run a suite of four tests that skip with ``reason`` and one that passes.

    ``arguments`` are pytest's, and ``ci`` is the value of the environment variable CI ('': not on CI).
    """
    tests = folder / "tests"
    tests.mkdir()
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (tests / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (tests / "test_suite.py").write_text(SUITE.format(reason=reason))
    command = [sys.executable, "-m", "pytest", "--numprocesses", workers, "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"CI": ci}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@in_one_process_and_in_workers
def test_four_tests_skipped_for_one_reason_are_one_line_before_the_summary(tmp_path: Path, workers: str) -> None:
    result = run_suite(tmp_path, NEEDS_TMUX, workers=workers, ci="")
    assert result.returncode == 0, result.stdout
    *_, line, summary = result.stdout.splitlines()
    assert line == f"not run here: 4 tests: {NEEDS_TMUX}"
    assert "1 passed, 4 skipped" in summary


@in_one_process_and_in_workers
def test_on_ci_a_run_fails_when_a_test_is_skipped(tmp_path: Path, workers: str) -> None:
    result = run_suite(tmp_path, NEEDS_TMUX, workers=workers, ci="true")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert f"not run here: 4 tests: {NEEDS_TMUX}" in result.stdout


@in_one_process_and_in_workers
@pytest.mark.parametrize("reason", ["not today", "needs patience: wait"])
def test_a_skip_that_names_no_known_kind_is_a_failure(tmp_path: Path, workers: str, reason: str) -> None:
    result = run_suite(tmp_path, reason, workers=workers, ci="")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert f"a skip names no known kind: {reason}" in result.stdout


@in_one_process_and_in_workers
def test_on_ci_a_run_passes_when_the_skipped_kind_is_in_may_lack(tmp_path: Path, workers: str) -> None:
    result = run_suite(tmp_path, NEEDS_TMUX, "--may-lack", "tmux", workers=workers, ci="true")
    assert result.returncode == 0, result.stdout


def test_a_kind_in_may_lack_that_the_machine_has_is_a_failure(tmp_path: Path) -> None:
    result = run_suite(tmp_path, NEEDS_TMUX, "--may-lack", "tmux, g++", workers="2", ci="true")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert "--may-lack names what this machine has: g++" in result.stdout


def test_an_unknown_kind_in_may_lack_is_refused(tmp_path: Path) -> None:
    result = run_suite(tmp_path, NEEDS_TMUX, "--may-lack", "emulated-hosts", workers="0", ci="true")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--may-lack emulated-hosts: the kinds are /dev/full, " in result.stderr


def test_a_selection_of_tests_passes_when_the_machine_has_a_kind_in_may_lack(tmp_path: Path) -> None:
    result = run_suite(tmp_path, NEEDS_TMUX, "--may-lack", "tmux,g++", "-k", "test_skipped", workers="0", ci="true")
    assert result.returncode == 0, result.stdout
