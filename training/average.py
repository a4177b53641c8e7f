"""The mean of several states of a training run, which averages out the noise of their last steps. Trains nothing.

python -m training.average --run DIR --run DIR --out DIR
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch


def average(runs: list[Path], out: Path) -> None:
    """Write a run whose weights are the mean of the weights of `runs`. All else is copied from the last of them."""
    states: list[dict[str, Any]] = [torch.load(run / "last.pt") for run in runs]
    mean = states[-1]
    for name, weight in mean["model"].items():
        weight.copy_(torch.stack([state["model"][name] for state in states]).mean(0))
    out.mkdir(parents=True)
    torch.save(mean, out / "last.pt")
    shutil.copyfile(runs[-1] / "tiktoken.model", out / "tiktoken.model")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, action="append", help="folder of a run; give several")
    parser.add_argument("--out", type=Path, required=True, help="folder of the new run")
    options = parser.parse_args()
    average(options.run, options.out)


if __name__ == "__main__":
    main()
