"""Tests of the tables of plans and checks: no cell is cut, neither in a pipe nor on a terminal of 80 columns."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mlx_k2.cli.console import show_plan
from mlx_k2.cli.doctor import show_checks
from mlx_k2.cli.main import run
from mlx_k2.cli.safe_console import SafeConsole
from mlx_k2.cluster.hostfile import Host
from mlx_k2.cluster.partition import StageAssignment
from mlx_k2.deployment.plan import StagePlan
from mlx_k2.doctor.checks import Check, CheckResult

HOSTS = [f"administrator@mac-studio-{name}.office.example.internal" for name in ("one", "two")]


def plans() -> list[StagePlan]:
    return [
        StagePlan(
            rank=rank,
            host=Host(ssh=host),
            assignment=StageAssignment(first_layer=30 * rank, end_layer=30 * rank + 30, held_bytes=0, read_bytes=0),
            shard_bytes=(100 + rank) * 10**9,
            needed_bytes=0,
            block_bytes=0,
            files=(),
        )
        for rank, host in enumerate(HOSTS)
    ]


CELLS = [["123.4 GB", "21.5 GB", "31"], ["124.4 GB", "22.5 GB", "32"]]
CHECKS = tuple(Check("an observation of it", CheckResult.OK, f"found on {host}", host) for host in HOSTS)
TABLES: dict[str, tuple[Callable[[], None], Sequence[str]]] = {  # a function that shows a table, and its cells
    "plan": (
        lambda: show_plan(plans(), CELLS, ("memory", "read per token", "files")),
        [*HOSTS, "0-29", "30-59", "100.0 GB", "101.0 GB", *CELLS[0], *CELLS[1], "read per token"],
    ),
    "doctor": (lambda: show_checks(CHECKS), [*HOSTS, "an observation of it", f"found on {HOSTS[1]}"]),
}


def output_lines(show_table: Callable[[], None], monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> list[str]:
    """Return the lines of a table on a terminal of 80 columns, or in a pipe."""
    file = io.StringIO()
    if is_terminal:
        console = SafeConsole(file=file, force_terminal=True, width=80, color_system=None)
        monkeypatch.setattr("mlx_k2.cli.console.console", console)
        monkeypatch.setattr("mlx_k2.cli.doctor.console", console)
    else:
        monkeypatch.setattr("sys.stderr", file)
    show_table()
    return file.getvalue().splitlines()


@pytest.mark.parametrize("name", TABLES)
def test_in_a_pipe_each_cell_is_complete_on_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    show_table, cells = TABLES[name]
    lines = output_lines(show_table, monkeypatch, is_terminal=False)
    assert all(any(cell in line for line in lines) for cell in cells)
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("name", TABLES)
def test_on_a_terminal_of_80_columns_long_cells_are_folded_and_the_others_are_on_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_table, cells = TABLES[name]
    lines = output_lines(show_table, monkeypatch, is_terminal=True)
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    long_cells = [cell for cell in cells if len(cell) > 30]  # host names, and findings that contain one
    assert all(any(cell in line for line in lines) for cell in cells if cell not in long_cells)
    # A column starts where all lines have a space. The parts of a folded cell are below each other in its column.
    starts = [0, *(index for index in range(1, 80) if all(line[index - 1 : index] in ("", " ") for line in lines))]
    columns = ["".join(line[start:].split("  ")[0].strip() for line in lines) for start in starts]
    for cell in long_cells:
        assert any(cell.replace(" ", "") in column.replace(" ", "") for column in columns), cell


def test_a_dry_run_in_a_pipe_shows_complete_host_names_and_all_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    entries = ", ".join(f'{{"ssh": "{host}", "ips": ["127.0.0.1"]}}' for host in HOSTS)
    (tmp_path / "hosts.json").write_text(f"[{entries}]")
    assert run(["generate", "--hostfile", str(tmp_path / "hosts.json"), "--dry-run"]) == 0
    headings, first, second, *_ = capsys.readouterr().err.splitlines()
    assert headings.split() == ["stage", "host", "layers", "weights", "memory", "read", "per", "token", "files"]
    assert (first.split()[1], second.split()[1]) == tuple(HOSTS)
    assert len(first) == len(second)
