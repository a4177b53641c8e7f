"""Tests of conftest.py's rules for skipped tests, on a small suite in one process and in two workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = "needs a GPU: run on a Mac"
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


def run_suite(folder: Path, reason: str, workers: str, ci: str) -> subprocess.CompletedProcess[str]:
    """Run a suite of four tests that skip with ``reason`` and one that passes."""
    (folder / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (folder / "test_suite.py").write_text(SUITE.format(reason=reason))
    command = [sys.executable, "-m", "pytest", "--numprocesses", workers, "-p", "no:cacheprovider", "--rootdir", "."]
    return subprocess.run(
        [*command, "."], cwd=folder, env=os.environ | {"CI": ci}, capture_output=True, text=True, timeout=60
    )


@in_one_process_and_in_workers
def test_each_kind_of_skipped_test_is_one_line_before_the_summary(tmp_path: Path, workers: str) -> None:
    ran = run_suite(tmp_path, NEEDS, workers, ci="")
    assert ran.returncode == 0, ran.stdout
    *_, line, summary = ran.stdout.splitlines()
    assert line == f"not run here: 4 tests: {NEEDS}"
    assert "1 passed, 4 skipped" in summary


@in_one_process_and_in_workers
def test_the_gate_fails_when_a_test_is_skipped(tmp_path: Path, workers: str) -> None:
    ran = run_suite(tmp_path, NEEDS, workers, ci="true")
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout
    assert f"not run here: 4 tests: {NEEDS}" in ran.stdout


@in_one_process_and_in_workers
def test_a_skip_without_the_word_needs_is_a_failure(tmp_path: Path, workers: str) -> None:
    assert run_suite(tmp_path, "not today", workers, ci="").returncode == pytest.ExitCode.TESTS_FAILED
