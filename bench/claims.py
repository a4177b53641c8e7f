"""Claims: two rates measured alternately, and the minimum of their ratio. The table of bench/README.md shows them.

python -m bench.claims    rewrites the table in bench/README.md from results/claims.csv
"""

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.measure import NUM_PAIRS, RESULTS, ROOT, alternate, commit, ratios, replace_generated, save_rows, summarize

README = ROOT / "bench" / "README.md"
MADE_BY = "python -m bench.claims"
RENAMED_SCRIPTS = {"guessing": "drafting"}
"""Present name of a script by its name in older rows."""
HEADER = ("commit", "script", "claim", "first", "second", "ratio", "asked")


class Claim(NamedTuple):
    """A comparison of two rates. ``first`` and ``second`` each measure one, in tokens or steps per second."""

    name: str
    first: Callable[[], float]
    second: Callable[[], float]
    required_ratio: float | None = None
    """Minimum of the first rate over the second. None if the ratio is only reported."""


class Options(NamedTuple):
    """Command-line options of every claims script."""

    num_pairs: int
    save: bool
    only: str
    """Measure only the claims whose names contain this text."""


def read_options(description: str | None) -> Options:
    """Parse the command line of a claims script."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/claims.csv")
    parser.add_argument(
        "--pairs", type=int, default=NUM_PAIRS, help=f"pairs of runs a claim, at least 2  [default: {NUM_PAIRS}]"
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="measure the claims whose names contain this text")
    arguments = parser.parse_args()
    if arguments.pairs < 2:
        parser.error("--pairs: give at least 2, since a row needs quartiles")
    if arguments.save and is_dirty(commit()):
        parser.error("--save needs a working tree without changes: a row names the commit that it measured")
    return Options(arguments.pairs, arguments.save, arguments.only)


def is_dirty(commit_name: str) -> bool:
    """Return whether ``commit_name``, a result of `commit`, names a working tree that differed from its commit."""
    return commit_name.endswith("+")


def measure(script: str, claim: Claim, options: Options) -> None:
    """Measure a claim: once to warm up, then in pairs. Print the ratio; with ``options.save`` append one row per pair.

    A claim that ``options.only`` excludes is skipped.
    """
    if options.only not in claim.name:
        return
    claim.first()
    claim.second()
    pairs = alternate(claim.first, claim.second, options.num_pairs)
    first_rates, second_rates = zip(*pairs, strict=True)
    required = "" if claim.required_ratio is None else f", required {claim.required_ratio}"
    rates = f"{summarize(first_rates)} against {summarize(second_rates)} per second"
    print(f"{claim.name}: {rates}, ratio {summarize(ratios(pairs))}{required}", flush=True)
    if options.save:
        rows = [
            (
                commit(),
                script,
                claim.name,
                f"{first:.3f}",
                f"{second:.3f}",
                f"{first / second:.4f}",
                claim.required_ratio,
            )
            for first, second in pairs
        ]
        save_rows("claims", HEADER, rows)


def table() -> str:
    """Return a Markdown table of each claim's newest rows: those with the date and commit of its last row.

    Rows of a dirty working tree are left out.
    """
    with (RESULTS / "claims.csv").open(newline="") as file:
        by_claim: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
        for row in csv.DictReader(file):
            if not is_dirty(row["commit"]):
                by_claim[RENAMED_SCRIPTS.get(row["script"], row["script"]), row["claim"]].append(row)
    lines = ["| measured by | claim | ratio: median (quartiles) | required | pairs, commit |", "|---|---|---|---|---|"]
    for (script, claim), rows in sorted(by_claim.items()):
        last = rows[-1]
        newest = [row for row in rows if row["date"] == last["date"] and row["commit"] == last["commit"]]
        ratio = _summarize_ratios([float(row["ratio"]) for row in newest])
        lines.append(
            f"| `bench.{script}` | {claim} | {ratio} | {last['asked'] or '-'} | {len(newest)}, {last['commit']} |"
        )
    return "\n".join(lines)


def _summarize_ratios(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    low, median, high = statistics.quantiles(values, n=4)
    return f"**{median:.2f}** ({low:.2f} to {high:.2f})"


def with_table(readme: str) -> str:
    """Return the text of bench/README.md with its table of claims generated again."""
    return replace_generated(readme, MADE_BY, table())


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
