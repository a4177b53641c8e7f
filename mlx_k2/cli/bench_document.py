"""The result of `mlx-k2 bench` as a JSON document and as lines of a CSV file. Measures nothing."""

import csv
import dataclasses
import io
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from mlx_k2 import __version__
from mlx_k2.benchmark import StageTimes, Workload, WorkloadResult
from mlx_k2.deployment.deploy import Deployment
from mlx_k2.errors import RequestError

_DERIVED_FIELDS = ("decode_tokens_per_s_per_stream", "stage_busy", "num_drafted", "num_accepted")


class BenchHost(msgspec.Struct, frozen=True, kw_only=True):
    """A host and its layers."""

    host: str
    system: str
    first_layer: int
    last_layer: int


class Versions(msgspec.Struct, frozen=True, kw_only=True):
    """The versions of the software. ``commit`` is None for an installed package."""

    mlx_k2: str
    commit: str | None
    mlx: str
    python: str


class BenchDocument(msgspec.Struct, frozen=True, kw_only=True):
    """All results, with model, hosts and versions. ``made`` is a UTC time.

    A row has the number of stages, the fields of Workload, and those of WorkloadResult, whose ``stages`` is
    ``stage_times`` here.
    """

    rows: list[dict[str, Any]]
    made: str
    model: str
    model_digest: str
    dtype: str
    draft: str
    hosts: list[BenchHost]
    versions: Versions


# The columns of the CSV file are fields of the document, of its versions, of a row, and of the stages in a row.
_DOCUMENT_COLUMNS = ("made", "model", "dtype", "draft")
_STAGE_FIELDS = tuple(field.name for field in dataclasses.fields(StageTimes))
# fields without a column: workload and stages have one for each of their fields
_WITHOUT_COLUMN = ("workload", "stages", "drafts", "draft_times")
_WORKLOAD_FIELDS = tuple(field.name for field in dataclasses.fields(Workload))
_RESULT_FIELDS = tuple(field.name for field in dataclasses.fields(WorkloadResult) if field.name not in _WITHOUT_COLUMN)
_ROW_COLUMNS = ("stages", *_WORKLOAD_FIELDS, *_DERIVED_FIELDS, *_RESULT_FIELDS)
_STAGE_COLUMNS = tuple(f"stage_{name}" for name in _STAGE_FIELDS)
CSV_COLUMNS = (*_DOCUMENT_COLUMNS, *Versions.__struct_fields__, *_ROW_COLUMNS, *_STAGE_COLUMNS)


def bench_document(
    deployment: Deployment, results: Sequence[WorkloadResult], model: str | None, draft: str
) -> BenchDocument:
    """Return the document of the results on ``deployment``. ``model`` is the value of --model."""
    return BenchDocument(
        rows=[_document_row(result, deployment.group.size) for result in results],
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model or "built-in",
        model_digest=deployment.model.digest,
        dtype=deployment.shape.dtype,
        draft=draft,
        hosts=[
            BenchHost(
                host=plan.host.ssh,
                system=hello.system,
                first_layer=plan.assignment.first_layer,
                last_layer=plan.assignment.end_layer - 1,
            )
            for plan, hello in zip(deployment.plans, deployment.hellos, strict=True)
        ],
        versions=Versions(
            mlx_k2=__version__,
            commit=checkout_commit(Path(__file__).parents[1]),
            mlx=version("mlx"),
            python=platform.python_version(),
        ),
    )


def _document_row(result: WorkloadResult, num_stages: int) -> dict[str, Any]:
    fields = dataclasses.asdict(result)
    workload, stage_times = fields.pop("workload"), fields.pop("stages")
    derived_fields = {name: getattr(result, name) for name in _DERIVED_FIELDS}
    return {"stages": num_stages, **workload, **derived_fields, "stage_times": stage_times, **fields}


def checkout_commit(package: Path) -> str | None:
    """Return the commit that is checked out in the git checkout of this project around the folder ``package``.

    None if the folder is in no checkout, or in another project's, or if git is not installed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(package), *arguments)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        is_own_checkout = Path(git("rev-parse", "--show-toplevel")).samefile(package.parent)
        return git("rev-parse", "HEAD") if is_own_checkout else None
    except (OSError, subprocess.CalledProcessError):
        return None


def check_csv(path: Path) -> None:
    """Refuse a file to which `append_csv` cannot append.

    Raises:
        RequestError: the file has content, and its first line is not the heading; or it cannot be read.
    """
    try:
        if not path.exists() or not path.stat().st_size:
            return
        with path.open("rb") as file:
            first_line = file.readline(64 * 1024)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    if first_line.strip() != _csv_line(CSV_COLUMNS).strip().encode():
        raise RequestError(f"{path} has other columns than those of mlx-k2 bench --csv: give another file")


def append_csv(path: Path, document: BenchDocument) -> None:
    """Append a line for each row; write a heading first if the file is new or empty."""
    first_cells = [getattr(document, name) for name in _DOCUMENT_COLUMNS]
    first_cells += msgspec.structs.astuple(document.versions)
    lines = [_csv_line([*first_cells, *_row_cells(row)]) for row in document.rows]
    with path.open("a", newline="") as file:
        if not file.tell():
            lines.insert(0, _csv_line(CSV_COLUMNS))
        file.write("".join(lines))


def _row_cells(row: Mapping[str, Any]) -> list[object]:
    """Return the cells of a row; a cell with one value for each stage joins the values with spaces."""
    values = {**row, "stage_busy": " ".join(f"{fraction:.4f}" for fraction in row["stage_busy"])}
    stage_cells = [" ".join(f"{stage[name]:.6g}" for stage in row["stage_times"]) for name in _STAGE_FIELDS]
    return [*(values[name] for name in _ROW_COLUMNS), *stage_cells]


def _csv_line(cells: Sequence[object]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
