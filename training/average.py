"""The mean of several checkpoints of one training run, which averages out the noise of the last steps before each.

python -m training.average --run DIR --run DIR --out DIR

Each --run is a copy of the run's folder, made when it held that checkpoint. Trains nothing.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch


def average(copies: list[Path], out: Path) -> None:
    """Write a run with the mean of the weights in `copies`. The rest of the state and the tokenizer are the last's."""
    states: list[dict[str, Any]] = [torch.load(copy / "last.pt") for copy in copies]
    mean = states[-1]
    for name, weight in mean["model"].items():
        weight.copy_(torch.stack([state["model"][name] for state in states]).mean(0))
    out.mkdir(parents=True)
    torch.save(mean, out / "last.pt")
    shutil.copyfile(copies[-1] / "tiktoken.model", out / "tiktoken.model")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run",
        type=Path,
        required=True,
        action="append",
        help="copy of the run's folder at one checkpoint; give several",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the new run")
    options = parser.parse_args()
    average(options.run, options.out)


if __name__ == "__main__":
    main()
