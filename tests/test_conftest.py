"""Tests of conftest.py's rules for skipped tests, on a small suite in one process and in two workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NEEDS = "needs tmux: apt install tmux"
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


def run_suite(folder: Path, reason: str, workers: str, ci: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a suite of four tests that skip with ``reason`` and one that passes."""
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    folder = folder / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (folder / "test_suite.py").write_text(SUITE.format(reason=reason))
    command = [sys.executable, "-m", "pytest", "--numprocesses", workers, "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=folder.parent, env=os.environ | {"CI": ci}, capture_output=True, text=True, timeout=60
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
@pytest.mark.parametrize("reason", ["not today", "needs patience: wait"])
def test_a_skip_that_names_no_known_kind_is_a_failure(tmp_path: Path, workers: str, reason: str) -> None:
    ran = run_suite(tmp_path, reason, workers, ci="")
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert f"a skip names no known kind: {reason}" in ran.stdout


@in_one_process_and_in_workers
def test_the_gate_passes_when_the_machine_lacks_what_it_may_lack(tmp_path: Path, workers: str) -> None:
    ran = run_suite(tmp_path, NEEDS, workers, "true", "--may-lack", "tmux")
    assert ran.returncode == 0, ran.stdout


def test_a_kind_that_the_machine_has_may_not_be_listed(tmp_path: Path) -> None:
    ran = run_suite(tmp_path, NEEDS, "2", "true", "--may-lack", "tmux, g++")
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED
    assert "--may-lack names what this machine has: g++" in ran.stdout


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    ran = run_suite(tmp_path, NEEDS, "0", "true", "--may-lack", "emulated-hosts")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--may-lack emulated-hosts: the kinds are /dev/full, Kimi's vocabulary, Linux, NVRTC" in ran.stderr


def test_a_part_of_the_suite_may_have_every_kind(tmp_path: Path) -> None:
    ran = run_suite(tmp_path, NEEDS, "0", "true", "--may-lack", "tmux,g++", "-k", "test_skipped")
    assert ran.returncode == 0, ran.stdout
