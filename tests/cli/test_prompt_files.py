"""Tests of files of prompts: fields and defaults of a line, errors with the line's number, and digests."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_k2.chat.sampling_options import SamplingOptions
from mlx_k2.cli.prompt_files import PromptLine, read_prompt_lines, result_digest
from mlx_k2.errors import RequestError
from mlx_k2.sampling import derived_seed


def write_prompts(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_a_line_holds_a_prompt_or_messages_with_sampling_options(tmp_path: Path) -> None:
    path = write_prompts(
        tmp_path, '{"prompt": "x", "top_k": 3, "id": "one"}', '{"messages": [{"role": "user"}], "seed": 4}'
    )
    first, second = read_prompt_lines(str(path)).values()
    assert (first.prompt, first.top_k, first.id, first.temperature) == ("x", 3, "one", None)
    assert (second.messages, second.seed) == ([{"role": "user"}], 4)


def test_a_value_in_a_line_overrides_the_option_even_if_it_is_the_default(tmp_path: Path) -> None:
    options = SamplingOptions(
        top_k=5, stop=("x",), num_answers=3, regex="a", ignore_eos=True, logit_bias={4: 1.0}, seed=9, timeout_s=2.0
    )

    def values(line: PromptLine) -> tuple[object, ...]:
        return line.top_k, line.stop, line.num_answers, line.regex, line.ignore_eos, line.logit_bias

    default = '{"prompt": "x", "top_k": null, "stop": [], "n": 1, "regex": null, "ignore_eos": false, "logit_bias": {}}'
    path = write_prompts(tmp_path, '{"prompt": "x"}', default)
    without_values, with_defaults = read_prompt_lines(str(path), options).values()
    assert values(without_values) == (5, ("x",), 3, "a", True, {4: 1.0})
    assert (without_values.timeout_s, without_values.seed) == (2.0, None)  # each line gets a derived seed later
    assert values(with_defaults) == (None, (), 1, None, False, {})
    assert result_digest([options], 1, without_values) != result_digest([options], 1, with_defaults)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"prompt": "x"', "line 2: column 15: expecting ',' delimiter"),
        ("-", "line 2: column 1: expecting value"),
        ('{"prompt": "x", "temperature": 11}', "line 2: temperature 11.0 is out of range"),
        ('{"prompt": "x", "max_tokens": 0}', "line 2: max_tokens: expected a whole number >= 1"),
        ('{"prompt": "x", "timeout": -1}', "line 2: timeout is -1 s: give more than 0"),
        ('{"prompt": "x", "tempereture": 1}', "line 2: contains unknown field `tempereture`"),
        ('{"id": 1}', 'line 2: give either "prompt" or "messages"'),
        ('{"prompt": "x", "messages": []}', 'line 2: give either "prompt" or "messages"'),
        ('{"prompt": "x", "id": 3}', "line 3: line 2 has the same id 3"),  # line 3 has no id: its number is used
        ('{"prompt": "x", "top_k": "many"}', "line 2: top_k: expected a whole number or null, got text"),
    ],
)
def test_an_invalid_line_is_refused_by_line_number(tmp_path: Path, line: str, error: str) -> None:
    path = write_prompts(tmp_path, '{"prompt": "fine"}', line, '{"prompt": "fine"}')
    with pytest.raises(RequestError, match=error):
        read_prompt_lines(str(path))


def test_an_id_that_two_lines_have_is_refused_with_both_lines(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, '{"prompt": "x", "id": "a"}', '{"prompt": "y"}', '{"prompt": "z", "id": "a"}')
    with pytest.raises(RequestError, match=r"prompts.jsonl, line 3: line 1 has the same id 'a'$"):
        read_prompt_lines(str(path))


def test_an_empty_and_a_missing_prompt_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no line"):
        read_prompt_lines(str(write_prompts(tmp_path)))
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        read_prompt_lines(str(tmp_path / "none.jsonl"))


def test_derived_seeds_differ_by_index_and_base_seed_and_are_the_same_again() -> None:
    seeds = [derived_seed(5, index) for index in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [derived_seed(5, index) for index in range(100)]
    assert derived_seed(6, 0) != seeds[0]


def test_blank_lines_are_skipped_but_counted_in_line_numbers(tmp_path: Path) -> None:
    path = write_prompts(tmp_path, "", '{"prompt": "x"}', "  \t", '{"prompt": "y"}', "")
    assert {number: line.prompt for number, line in read_prompt_lines(str(path)).items()} == {2: "x", 4: "y"}


def test_a_dash_as_the_path_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "x"}\n{"prompt": 3}')))
    with pytest.raises(RequestError, match="standard input, line 2: prompt: expected text or null"):
        read_prompt_lines("-")


def test_a_digest_changes_with_the_run_the_line_and_its_number() -> None:
    line = PromptLine(prompt="x")
    digests = {
        result_digest(["m", 1], 1, line),
        result_digest(["n", 1], 1, line),
        result_digest(["m", 2], 1, line),
        result_digest(["m", 1], 2, line),
        result_digest(["m", 1], 1, PromptLine(prompt="y")),
        result_digest(["m", 1], 1, PromptLine(prompt="x", timeout_s=3)),
    }
    assert len(digests) == 6
