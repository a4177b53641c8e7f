"""Claims: two sides measured alternately, and the ratio required of them. Their rows make the table of bench/README.md.

python -m bench.claims    rewrites the table in bench/README.md from results/claims.csv
"""

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.measure import NUM_PAIRS, RESULTS, ROOT, alternate, commit, save_rows, summarize, with_part

NAME = "claims"
README = ROOT / "bench" / "README.md"
MADE_BY = "python -m bench.claims"
SCRIPTS = {"guessing": "drafting"}
"""Current name of a script, by its name in older rows."""
HEADER = ("commit", "script", "claim", "first", "second", "ratio", "asked")


class Claim(NamedTuple):
    """Two sides, each a rate in tokens or steps per second, and the minimum ratio of first over second, if any."""

    name: str
    first: Callable[[], float]
    second: Callable[[], float]
    asked: float | None = None


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
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS, help=f"pairs of runs a claim  [default: {NUM_PAIRS}]")
    parser.add_argument("--only", default="", metavar="WORDS", help="measure the claims whose names contain this text")
    arguments = parser.parse_args()
    if arguments.save and is_dirty(commit()):
        parser.error("--save needs a working tree without changes: a row names the commit that it measured")
    return Options(arguments.pairs, arguments.save, arguments.only)


def is_dirty(name: str) -> bool:
    """Return whether `commit` named a working tree that differed from its commit."""
    return name.endswith("+")


def measure(script: str, claim: Claim, options: Options) -> None:
    """Run both sides to warm up, then alternately. Print the ratio; with ``options.save`` append the pairs' rows."""
    if options.only not in claim.name:
        return
    claim.first()
    claim.second()
    pairs = alternate(claim.first, claim.second, options.num_pairs)
    firsts, seconds = zip(*pairs, strict=True)
    ratios = [first / second for first, second in pairs]
    asked = "" if claim.asked is None else f", asked {claim.asked}"
    print(
        f"{claim.name}: {summarize(firsts)} against {summarize(seconds)} a second, ratio {summarize(ratios)}{asked}",
        flush=True,
    )
    if options.save:
        rows = [
            (commit(), script, claim.name, f"{first:.3f}", f"{second:.3f}", f"{first / second:.4f}", claim.asked)
            for first, second in pairs
        ]
        save_rows(NAME, HEADER, rows)


def table() -> str:
    """Return a Markdown table of each claim's newest rows, without rows of a working tree that differed."""
    with (RESULTS / f"{NAME}.csv").open(newline="") as file:
        by_claim: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
        for row in csv.DictReader(file):
            if not is_dirty(row["commit"]):
                by_claim[SCRIPTS.get(row["script"], row["script"]), row["claim"]].append(row)
    lines = ["| measured by | what | ratio: median (quartiles) | asked | pairs, commit |", "|---|---|---|---|---|"]
    for (script, claim), rows in sorted(by_claim.items()):
        newest = [row for row in rows if (row["date"], row["commit"]) == (rows[-1]["date"], rows[-1]["commit"])]
        lines.append(
            f"| `bench.{script}` | {claim} | {_ratio(newest)} | {rows[-1]['asked'] or '-'} "
            f"| {len(newest)}, {rows[-1]['commit']} |"
        )
    return "\n".join(lines)


def _ratio(rows: Sequence[dict[str, str]]) -> str:
    values = [float(row["ratio"]) for row in rows]
    if len(values) == 1:
        return f"{values[0]:.2f}"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"**{middle:.2f}** ({low:.2f} to {high:.2f})"


def with_table(readme: str) -> str:
    """Return the page with its table generated again."""
    return with_part(readme, MADE_BY, table())


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
