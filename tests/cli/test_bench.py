"""Tests of `mlx-k2 bench`: its JSON document, CSV file, trace and plot, with one row per combination of options."""

import csv
import json
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from matplotlib.image import imread

from mlx_k2.cli.bench_document import BenchDocument, append_csv, check_csv, checkout_commit
from mlx_k2.cli.main import run
from tests.advice import follows_advice
from tests.cli.command import CommandLine
from tests.processes import started_processes

SHORT = ("--generate", "4", "--prompt-lengths", "16,40", "--streams", "1,3")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def document(command_line: CommandLine, files: Path) -> dict[str, Any]:
    names = {"--csv": "rows.csv", "--trace": "trace.json", "--plot": "plot.png"}
    measured = command_line.run(
        *("bench", *SHORT, "--json"),
        *(word for name in names for word in (name, str(files / names[name]))),
        PATH=str(files),  # there is no git
    )
    assert measured.returncode == 0, measured.stderr
    found: dict[str, Any] = json.loads(measured.stdout)
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
    assert document["versions"]["commit"] is None


def test_the_csv_file_has_a_line_for_each_row(document: dict[str, Any], files: Path) -> None:
    with (files / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["streams"]) for line in lines] == [row["streams"] for row in document["rows"]]
    assert [float(line["wall_s"]) for line in lines] == [row["wall_s"] for row in document["rows"]]
    assert all(None not in line for line in lines)  # no cell without a heading


def test_rows_are_appended_to_a_file_with_the_same_columns(document: dict[str, Any], files: Path) -> None:
    read = msgspec.convert(document, BenchDocument)
    path = files / "appended.csv"
    path.touch()
    for _ in range(2):
        check_csv(path)
        append_csv(path, read)
    lines = (files / "rows.csv").read_text().splitlines(keepends=True)
    assert path.read_text() == "".join([*lines, *lines[1:]])


@follows_advice(
    "rows.csv has other columns than those of mlx-k2 bench --csv: give another file",
)
@pytest.mark.parametrize("content", ["my notes\n", "made,model\n1,2\n", "\n", "x" * 100_000])
def test_a_csv_file_of_something_else_is_refused_before_any_stage_starts(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    before = started_processes()
    assert run(["bench", "--csv", str(path)]) == 2
    assert "has other columns than those of mlx-k2 bench --csv: give another file" in capsys.readouterr().err
    assert (path.read_text(), started_processes()) == (content, before)


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=x", "-c", "user.email=x@x.example")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def package_in(folder: Path) -> Path:
    package = folder / "mlx_k2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    return package


def test_a_checkout_has_its_commit_and_a_package_installed_in_another_project_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    for project, package in ((own, package_in(own)), (other, package_in(other / "vendored"))):
        git(project, "init", "--quiet")
        git(project, "add", str(package))
        git(project, "commit", "--quiet", "--message", "x")
    commit = git(own, "rev-parse", "HEAD")
    assert checkout_commit(own / "mlx_k2") == commit
    assert checkout_commit(other / "vendored" / "mlx_k2") is None
    assert checkout_commit(package_in(other / "venv")) is None
    assert checkout_commit(package_in(other)) is None  # at its top, and not a part of it
    assert checkout_commit(package_in(tmp_path / "installed")) is None
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert checkout_commit(own / "mlx_k2") == commit
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout_commit(own / "mlx_k2") is None


def test_the_trace_has_a_track_for_each_stage_whose_spans_do_not_overlap(document: dict[str, Any], files: Path) -> None:
    assert document
    events = json.loads((files / "trace.json").read_text())["traceEvents"]
    for rank in (0, 1):
        computed = [event for event in events if event["pid"] == rank and event["name"].startswith("step ")]
        assert len(computed) > 20
        assert {event["cat"] for event in computed} == {"prefill", "decode"}


@pytest.mark.slow
def test_without_trace_no_step_is_collected(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("mlx_k2.cli.bench.Trace")
    assert run(["bench", "--generate", "2", "--prompt-lengths", "16", "--streams", "1"]) == 0, capsys.readouterr().err


def test_the_plot_is_a_png_with_the_expected_size_and_lines(document: dict[str, Any], files: Path) -> None:
    assert document
    picture = imread(files / "plot.png")
    assert picture.shape[:2] == (600, 1500)
    colours = np.rint(picture * 255).astype(np.uint8).view(np.uint32)  # red, green, blue and opacity in one number
    assert len(np.unique(colours)) > 100  # anti-aliased colours of two lines


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--csv", "nowhere/rows.csv"], "there is no folder"),
        (["--plot", "nowhere/plot.png"], "there is no folder"),
        (["--streams", "0"], "not a whole number from 1"),
        (["--streams", "1,x"], "not a whole number from 1"),
        (["--streams", "100"], "at most 64 sequences"),
        (["--prompt-lengths", ""], "not a whole number from 1"),
        (["--generate", "1"], "not in the range"),
        (["--context", "64", "--prompt-lengths", "60"], "give --context 188"),
    ],
)
def test_bad_bench_options_are_refused_before_any_stage_starts(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = started_processes()
    assert run(["bench", *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert started_processes() == before
