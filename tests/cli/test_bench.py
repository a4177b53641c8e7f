"""Tests of `mlx-k2 bench`: its JSON document, CSV file, trace and plot, with one row per combination of options."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from tests.cli.command import CommandLine

SHORT = ("--generate", "4", "--prompt-lengths", "16,40", "--streams", "1,3")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def document(command_line: CommandLine, files: Path) -> dict[str, Any]:
    names = {"--csv": "rows.csv", "--trace": "trace.json", "--plot": "plot.png"}
    run = command_line.run(
        "bench", *SHORT, "--json", *(word for name in names for word in (name, str(files / names[name])))
    )
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_each_combination_of_options_is_one_row(document: dict[str, Any]) -> None:
    rows = [(row["prompt_tokens"], row["streams"], row["stages"]) for row in document["rows"]]
    assert rows == [(16, 1, 2), (16, 3, 2), (40, 1, 2), (40, 3, 2)]


def test_a_row_holds_speeds_and_per_stage_times(document: dict[str, Any]) -> None:
    for row in document["rows"]:
        assert row["generate_tokens"] == 4
        assert row["decode_tokens_per_s"] > 0
        assert row["decode_tokens_per_s_per_stream"] == pytest.approx(row["decode_tokens_per_s"] / row["streams"])
        assert 0 < row["time_to_first_token_s"] < row["wall_s"]
        assert row["inter_token_p50_s"] <= row["inter_token_p95_s"]
        assert all(0 < fraction <= 1 for fraction in row["stage_busy"])
        first, last = row["stage_times"]
        assert first["hop_bytes"] > last["hop_bytes"] == 0
        assert all(times["peak_bytes"] > 0 for times in row["stage_times"])


def test_the_document_names_model_dtype_hosts_and_versions(document: dict[str, Any]) -> None:
    assert document["model"] == "built-in"
    assert document["dtype"] == "float32"
    assert [host["host"] for host in document["hosts"]] == ["127.0.0.1", "127.0.0.1"]
    assert {"mlx_k2", "mlx", "python", "commit"} == document["versions"].keys()


def test_the_csv_file_has_a_line_for_each_row(document: dict[str, Any], files: Path) -> None:
    with (files / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["streams"]) for line in lines] == [row["streams"] for row in document["rows"]]


def test_the_trace_has_a_track_for_each_stage_whose_spans_do_not_overlap(document: dict[str, Any], files: Path) -> None:
    assert document
    events = json.loads((files / "trace.json").read_text())["traceEvents"]
    for rank in (0, 1):
        computed = [event for event in events if event["pid"] == rank and event["name"].startswith("step ")]
        assert len(computed) > 20
        assert {event["cat"] for event in computed} == {"prefill", "decode"}


def test_the_plot_is_a_png_with_the_expected_size_and_lines(document: dict[str, Any], files: Path) -> None:
    assert document
    picture = imread(files / "plot.png")
    assert picture.shape[:2] == (600, 1500)
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 100  # anti-aliased colours of two lines


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--csv", "nowhere/rows.csv"], "there is no folder"),
        (["--plot", "nowhere/plot.png"], "there is no folder"),
        (["--streams", "0"], "not a list of numbers above 0"),
        (["--streams", "1,x"], "not a list of numbers above 0"),
        (["--streams", "100"], "at most 64 sequences"),
        (["--prompt-lengths", ""], "not a list of numbers above 0"),
        (["--generate", "1"], "not in the range"),
        (["--context", "64", "--prompt-lengths", "60"], "give --context 188"),
    ],
)
def test_bad_bench_options_are_refused_before_any_stage_starts(
    command_line: CommandLine, options: list[str], words: str
) -> None:
    run = command_line.run("bench", *options)
    assert run.returncode == 2
    assert words in " ".join(run.stderr.split())
