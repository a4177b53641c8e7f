"""Tests of `mlx-k2 bench`: its JSON document, CSV file, trace and plot, with a row for each length and stream count."""

import csv
import json
import subprocess
from collections import Counter
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

WORKLOADS = ("--generate", "4", "--prompt-lengths", "16,40", "--streams", "1,3")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the CSV file, the trace and the plot that `document` writes."""
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def document(command_line: CommandLine, folder: Path) -> dict[str, Any]:
    """Return the JSON document of a run without git, which also writes the files in `folder`."""
    files = (
        "--csv",
        str(folder / "rows.csv"),
        "--trace",
        str(folder / "trace.json"),
        "--plot",
        str(folder / "plot.png"),
    )
    result = command_line.run("bench", *WORKLOADS, "--json", *files, PATH=str(folder))
    assert result.returncode == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_each_combination_of_prompt_length_and_streams_is_one_row(document: dict[str, Any]) -> None:
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


def test_the_csv_file_has_a_line_for_each_row(document: dict[str, Any], folder: Path) -> None:
    with (folder / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["streams"]) for line in lines] == [row["streams"] for row in document["rows"]]
    assert [float(line["wall_s"]) for line in lines] == [row["wall_s"] for row in document["rows"]]
    assert all(None not in line for line in lines)  # csv puts cells without a heading under None


def test_rows_are_appended_to_a_file_with_the_same_columns(document: dict[str, Any], folder: Path) -> None:
    path = folder / "appended.csv"
    path.touch()
    for _ in range(2):
        check_csv(path)
        append_csv(path, msgspec.convert(document, BenchDocument))
    heading, *rows = (folder / "rows.csv").read_text().splitlines()
    assert path.read_text().splitlines() == [heading, *rows, *rows]


@follows_advice(
    "rows.csv has other columns than those of mlx-k2 bench --csv: give another file",
)
@pytest.mark.parametrize("content", ["my notes\n", "made,model\n1,2\n", "\n", "x" * 100_000])
def test_a_csv_file_with_other_columns_is_refused_before_any_stage_starts(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    before = started_processes()
    assert run(["bench", "--csv", str(path)]) == 2
    assert "has other columns than those of mlx-k2 bench --csv: give another file" in capsys.readouterr().err
    assert (path.read_text(), started_processes()) == (content, before)


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return its output."""
    identity = ("-c", "user.name=x", "-c", "user.email=x@x.example")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


def make_package(folder: Path) -> Path:
    """Create an empty package mlx_k2 in a folder and return the package's folder."""
    package = folder / "mlx_k2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    return package


def test_a_checkout_has_its_commit_and_a_package_installed_in_another_project_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, other = tmp_path / "checkout", tmp_path / "other"
    for project, package in ((checkout, make_package(checkout)), (other, make_package(other / "vendored"))):
        git(project, "init", "--quiet")
        git(project, "add", str(package))
        git(project, "commit", "--quiet", "--message", "x")
    commit = git(checkout, "rev-parse", "HEAD")
    assert checkout_commit(checkout / "mlx_k2") == commit
    assert checkout_commit(other / "vendored" / "mlx_k2") is None
    assert checkout_commit(make_package(other / "venv")) is None
    assert checkout_commit(make_package(other)) is None  # git does not track this package
    assert checkout_commit(make_package(tmp_path / "installed")) is None
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert checkout_commit(checkout / "mlx_k2") == commit
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert checkout_commit(checkout / "mlx_k2") is None


def test_the_trace_has_the_prefill_and_decode_steps_of_each_row_for_each_stage(
    document: dict[str, Any], folder: Path
) -> None:
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    num_rows = len(document["rows"])
    for rank in (0, 1):
        steps = [event for event in events if event["pid"] == rank and event["name"].startswith("step ")]
        num_steps = Counter(event["cat"] for event in steps)
        assert num_steps.keys() == {"prefill", "decode"}
        assert num_steps["prefill"] >= num_rows
        assert num_steps["decode"] >= num_rows * 3  # prefill samples the first of 4 tokens


@pytest.mark.slow
def test_without_trace_no_step_is_kept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delattr("mlx_k2.cli.bench.Trace")  # the run would fail if it made a trace
    assert run(["bench", "--generate", "2", "--prompt-lengths", "16", "--streams", "1"]) == 0, capsys.readouterr().err


@pytest.mark.usefixtures("document")
def test_the_plot_is_a_png_with_the_expected_size_and_lines(folder: Path) -> None:
    picture = imread(folder / "plot.png")
    assert picture.shape[:2] == (600, 1500)
    colours = np.rint(picture * 255).astype(np.uint8).view(np.uint32)  # red, green, blue and opacity in one number
    assert len(np.unique(colours)) > 100  # anti-aliased colours of two lines


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--csv", "nowhere/rows.csv"], "there is no folder"),
        (["--plot", "nowhere/plot.png"], "there is no folder"),
        (["--plot", "plot.svg"], "--plot plot.svg: the charts are a PNG image: give a name that ends in .png"),
        (["--streams", "0"], "not a whole number from 1"),
        (["--streams", "1,x"], "not a whole number from 1"),
        (["--streams", "100"], "at most 64 sequences"),
        (["--prompt-lengths", ""], "not a whole number from 1"),
        (["--generate", "1"], "not in the range"),
        (["--context", "64", "--prompt-lengths", "60"], "give --context 188"),  # --generate is 128 by default
    ],
)
def test_bad_bench_options_are_refused_before_any_stage_starts(
    options: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = started_processes()
    assert run(["bench", *options]) == 2
    assert error in " ".join(capsys.readouterr().err.split())
    assert started_processes() == before
