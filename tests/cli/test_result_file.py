"""Tests of the file of results: no result is lost, no other run's file is changed, and sort orders a complete file."""

import json
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.cli.result_file import ResultFile
from mlx_k2.errors import RequestError

NUMBER_OF_DIGEST = {"a": 1, "b": 2, "c": 3}
"""The number of each line of a run, by the line's digest, which results have in ``run``."""


def texts(path: Path) -> list[Any]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def write_results(path: Path, *numbers: int) -> None:
    with ResultFile(path) as results:
        results.resume(NUMBER_OF_DIGEST)
        for number in numbers:
            results.write(number, {"text": number})


def test_results_are_on_the_disk_as_they_finish_and_in_order_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ResultFile(out) as results:
        results.resume(NUMBER_OF_DIGEST)
        for number in (3, 1, 2):
            results.write(number, {"text": number})
            assert texts(out)[-1] == number
        assert texts(out) == [3, 1, 2]
        results.sort()
    assert texts(out) == [1, 2, 3]
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


@pytest.mark.parametrize("incomplete", [b'{"text": "cut o', b"\0" * 20, b'{"te\0\0'])
def test_a_second_run_keeps_the_results_of_the_first_but_no_incomplete_line(tmp_path: Path, incomplete: bytes) -> None:
    out = tmp_path / "out"
    write_results(out, 3)
    out.write_bytes(out.read_bytes() + incomplete)
    with ResultFile(out) as results:
        results.resume(NUMBER_OF_DIGEST)
        assert [number in results for number in (1, 2, 3)] == [False, False, True]
        results.write(1, {"text": 1})
    assert texts(out) == [3, 1]


def test_an_error_of_a_line_is_replaced_by_the_result_of_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ResultFile(out) as results:
        results.resume(NUMBER_OF_DIGEST)
        results.write(2, {"error": "no"})
        results.write(1, {"text": 1})
        assert len(results) == 1  # the error is not counted
        results.sort()
    assert [sorted(json.loads(line)) for line in out.read_text().splitlines()] == [["run", "text"], ["error", "run"]]
    with ResultFile(out) as results:
        results.resume(NUMBER_OF_DIGEST)
        assert 2 not in results
        results.write(2, {"text": 2})
        results.write(3, {"text": 3})
        results.sort()
    assert texts(out) == [1, 2, 3]


@pytest.mark.parametrize("content", ["notes of mine\n", "notes of mine", '{"run": "z"}\n', '{"run": "a"}\n[]\n'])
def test_a_file_of_another_run_is_refused_and_not_changed(tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    out.write_text(content)
    with ResultFile(out) as results, pytest.raises(RequestError, match="belongs to another run"):
        results.resume(NUMBER_OF_DIGEST)
    assert out.read_text() == content


def test_a_file_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ResultFile(out) as results:
        results.resume(NUMBER_OF_DIGEST)
        results.write(1, {"text": 1})
        with (
            pytest.raises(RequestError, match=r"out is being written by another run: give another --out"),
            ResultFile(out),
        ):
            pass
    write_results(out, 2)
    assert texts(out) == [1, 2]


def test_a_file_that_is_replaced_while_it_is_opened_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_results(out, 1)
    real_open = os.open

    def open_then_replace(path: str, flags: int, mode: int = 0o777) -> int:
        descriptor = real_open(path, flags, mode)
        (tmp_path / "new").write_bytes(b"")
        (tmp_path / "new").replace(out)
        return descriptor

    monkeypatch.setattr(os, "open", open_then_replace)
    with pytest.raises(RequestError, match="is being written by another run"), ResultFile(out):
        pass


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda path: path.mkdir(), "out cannot be written: Is a directory"),
        (os.mkfifo, "out is not a regular file: a run that continues reads its results from --out"),
        (lambda path: path.symlink_to("nowhere/out"), "out cannot be written: No such file or directory"),
    ],
    ids=["folder", "pipe", "missing folder"],
)
def test_a_path_that_cannot_hold_results_is_refused_when_it_is_opened(tmp_path: Path, make: Any, error: str) -> None:
    make(tmp_path / "out")
    with pytest.raises(RequestError, match=error), ResultFile(tmp_path / "out"):
        pass


def test_a_run_that_writes_nothing_leaves_no_new_file_and_keeps_an_old_one(tmp_path: Path) -> None:
    write_results(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").touch()
    write_results(tmp_path / "old")
    assert (tmp_path / "old").exists()


def test_the_name_of_the_file_is_in_the_error_of_a_full_disk(tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ResultFile(out) as results:
        results.resume(NUMBER_OF_DIGEST)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # in place of a full disk
        try:
            with pytest.raises(OSError, match="File too large") as raised:
                results.write(1, {"text": "x" * 1000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert raised.value.filename == str(out)
    write_results(out, 1, 2)
    assert texts(out) == [1, 2]
