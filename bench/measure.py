"""Shared functions of the benchmarks: prompts, alternating pairs, summaries, saved rows, generated parts of pages."""

import csv
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
NUM_PAIRS = 7


def prompt_ids(count: int) -> list[int]:
    """Return ``count`` token ids below 256, the same in each call."""
    return [int(token_id) for token_id in np.random.default_rng(0).integers(0, 256, count)]


def alternate(
    first: Callable[[], float], second: Callable[[], float], num_pairs: int = NUM_PAIRS
) -> list[tuple[float, float]]:
    """Return ``num_pairs`` pairs of results. A pair's two calls run in turn, so changes of machine load affect both."""
    return [(first(), second()) for _ in range(num_pairs)]


def summarize(values: Sequence[float]) -> str:
    """Return the median, and the first and third quartile in parentheses, as text. Needs at least two values."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


def ratios(pairs: Sequence[tuple[float, float]]) -> list[float]:
    """Return first / second for each pair."""
    return [first / second for first, second in pairs]


def save_rows(name: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """Append rows to results/NAME.csv, each with date, machine and package versions; return the file's path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    is_new = not path.exists()
    provenance = (date.today().isoformat(), machine(), version("mlx-k2"), version("mlx"), version("mlx-lm"))
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(("date", "machine", "mlx_k2", "mlx", "mlx_lm", *header))
        writer.writerows((*provenance, *row) for row in rows)
    return path


def commit() -> str:
    """Return 7 digits of the checked-out commit, with a plus if files outside bench/results differ from it."""
    changed_files = _git("status", "--porcelain", "--", ".", ":!bench/results")
    return _git("rev-parse", "--short=7", "HEAD") + ("+" if changed_files else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def replace_generated(page: str, made_by: str, text: str) -> str:
    """Return ``page`` with ``text`` between its comments "made by ``made_by``" and "end"."""
    begin, end = f"<!-- made by {made_by} -->\n", "<!-- end -->\n"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text}\n\n{end}{after}"


def machine() -> str:
    """Return the system, processor and number of cores."""
    return f"{platform.system()} {platform.machine()} {os.cpu_count()} cores"
