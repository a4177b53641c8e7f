"""Tests of prompt and result files: a bad line is named by its number, and written results are kept."""

import json
import os
import resource
import stat
from pathlib import Path

import pytest

from mlx_k2.cli.prompt_files import PromptLine, ResultFile, line_seed, read_prompt_lines, run_digest
from mlx_k2.errors import RequestError

DIGESTS = ["a", "b", "c"]


def prompts(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_all(path: Path, *indexes: int) -> list[object]:
    with ResultFile(path, DIGESTS) as results:
        for index in indexes:
            results.write(index, {"text": str(index)})
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_a_line_holds_a_prompt_or_messages_with_sampling_options(tmp_path: Path) -> None:
    path = prompts(tmp_path, '{"prompt": "x", "top_k": 3, "id": "one"}', '{"messages": [{"role": "user"}], "seed": 4}')
    first, second = read_prompt_lines(path)
    assert (first.prompt, first.top_k, first.id, first.temperature) == ("x", 3, "one", None)
    assert (second.messages, second.seed) == ([{"role": "user"}], 4)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x"', "line 2: column 15: expecting ',' delimiter"),
        ("", "line 2: column 1: expecting value"),
        ('{"prompt": "x", "tempereture": 1}', "line 2: contains unknown field `tempereture`"),
        ('{"id": 1}', 'line 2: give either "prompt" or "messages"'),
        ('{"prompt": "x", "messages": []}', 'line 2: give either "prompt" or "messages"'),
        ('{"prompt": "x", "top_k": "many"}', "line 2: top_k: expected a whole number or null, got text"),
    ],
)
def test_an_invalid_line_is_refused_by_line_number(tmp_path: Path, line: str, words: str) -> None:
    path = prompts(tmp_path, '{"prompt": "fine"}', line, '{"prompt": "fine"}')
    with pytest.raises(RequestError, match=words):
        read_prompt_lines(path)


def test_an_empty_and_a_missing_prompt_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no line"):
        read_prompt_lines(prompts(tmp_path))
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_prompt_lines(tmp_path / "none.jsonl")


def test_results_are_written_in_the_order_of_their_prompts(tmp_path: Path) -> None:
    assert write_all(tmp_path / "out", 2, 0, 1) == ["0", "1", "2"]


def test_a_result_is_not_written_before_all_earlier_results(tmp_path: Path) -> None:
    assert write_all(tmp_path / "out", 0, 2) == ["0"]


def test_a_second_run_resumes_after_the_last_complete_result(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_all(out, 0)
    out.write_bytes(out.read_bytes() + b'{"text": "cut o')
    assert ResultFile(out, DIGESTS).num_done == 1
    assert write_all(out, 1, 2) == ["0", "1", "2"]
    assert ResultFile(out, DIGESTS).num_done == 3


@pytest.mark.parametrize(
    "content", ["notes of mine\n", "notes of mine", '{"run": "z"}\n', '{"run": "a"}\n[]\n', '{"run": "a"}\n' * 4]
)
def test_a_result_file_of_another_run_is_refused_and_not_changed(tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    out.write_text(content)
    with pytest.raises(RequestError, match="belongs to another run"):
        ResultFile(out, DIGESTS)
    assert out.read_text() == content


def test_each_line_gets_its_own_seed_derived_from_the_base_seed() -> None:
    seeds = [line_seed(5, index) for index in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [line_seed(5, index) for index in range(100)]
    assert line_seed(6, 0) != seeds[0]


def test_a_digest_changes_with_model_options_and_prompt() -> None:
    line = PromptLine(prompt="x")
    digests = {
        run_digest("m", [1], line),
        run_digest("n", [1], line),
        run_digest("m", [2], line),
        run_digest("m", [1], PromptLine(prompt="y")),
    }
    assert len(digests) == 4


def test_a_result_file_that_another_run_writes_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with ResultFile(out, DIGESTS) as results:
        results.write(0, {"id": 0})
        with pytest.raises(RequestError, match=r"out is being written by another run: give another --out"):
            ResultFile(out, DIGESTS)
    assert ResultFile(out, DIGESTS).num_done == 1


def test_results_that_another_run_wrote_meanwhile_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first, second = ResultFile(out, DIGESTS), ResultFile(out, DIGESTS)
    with first:
        first.write(0, {"id": 0})
    with second:
        assert second.num_done == 1
        second.write(1, {"id": 1})
    assert ResultFile(out, DIGESTS).num_done == 2


def test_a_result_file_is_private_and_its_name_is_in_the_error_of_a_full_disk(tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with ResultFile(out, DIGESTS) as results:
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
        try:
            with pytest.raises(OSError, match="File too large") as raised:
                results.write(0, {"text": "x" * 1000})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
            os.truncate(out, 0)
    assert raised.value.filename == str(out)


def test_a_result_file_that_is_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    with pytest.raises(RequestError, match=r"out cannot be written: File or stream is not seekable"):
        ResultFile(tmp_path / "out", DIGESTS)
