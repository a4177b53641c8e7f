"""What guesses bring a lone stream on two stages: on text that repeats itself, and on random text.

python -m bench.guessing [--save] [--pairs N]

The same requests with guesses and without, one right after the other, on deployments of their own. The checkpoint's
greedy text goes round in a circle (bench/checkpoints.py); at temperature 1 it never does. --save appends the rows to
results/guessing.csv.
"""

import argparse
import contextlib
import time
from typing import NamedTuple

from bench.checkpoints import cycle_checkpoint
from bench.deployments import local_deployment
from bench.measure import NUM_PAIRS, alternate, prompt_ids, ratios, save_rows, summarize
from mlx_k2.deployment import Deployment
from mlx_k2.engine.request import Request
from mlx_k2.sampling import Sampling
from mlx_k2.session import coordinate

PROMPT_TOKENS = 32
TOKENS = 240
SKIPPED = 140
"""Tokens before the measured ones: the text must first repeat itself."""


class Text(NamedTuple):
    """A kind of text, and the ratio that is asked for."""

    name: str
    temperature: float
    wanted: float


TEXTS = (Text("text that repeats itself", 0.0, 1.5), Text("random text", 1.0, 0.95))


class Stream:
    """One stream after the other on the same stages; ``hit_rate`` is that of the last one."""

    def __init__(self, deployment: Deployment, *, guesses: bool) -> None:
        self._coordinator = coordinate(deployment, guesses=guesses)
        self.hit_rate = 0.0

    def rate(self, temperature: float) -> float:
        """Tokens per second after the skipped ones."""
        sampling = Sampling(seed=0, temperature=temperature)
        request = Request(tuple(prompt_ids(PROMPT_TOKENS)), TOKENS, sampling, frozenset())
        arrivals = []
        for event in self._coordinator.run(request):
            arrivals.append(time.perf_counter())
            if len(arrivals) == SKIPPED:
                guesses, hits = event.sequence.num_guesses, event.sequence.num_hits
        self.hit_rate = (event.sequence.num_hits - hits) / max(1, event.sequence.num_guesses - guesses)
        return (len(arrivals) - 1 - SKIPPED) / (arrivals[-1] - arrivals[SKIPPED])


def main() -> None:
    """Measure, print, and with --save keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/guessing.csv")
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS)
    arguments = parser.parse_args()
    folder = cycle_checkpoint()
    with contextlib.ExitStack() as stack:
        guessing, plain = (
            Stream(stack.enter_context(local_deployment(folder, 2)), guesses=guesses) for guesses in (True, False)
        )
        for text in TEXTS:
            measure(text, guessing, plain, arguments.pairs, arguments.save)


def measure(text: Text, guessing: Stream, plain: Stream, num_pairs: int, save: bool) -> None:
    """Pairs for one kind of text."""
    guessing.rate(text.temperature)  # both warm up
    plain.rate(text.temperature)
    pairs = alternate(lambda: guessing.rate(text.temperature), lambda: plain.rate(text.temperature), num_pairs)
    ours, theirs = zip(*pairs, strict=True)
    print(
        f"{text.name}, hit rate {guessing.hit_rate:.2f}: {summarize(ours)} with guesses, "
        f"{summarize(theirs)} tok/s without, ratio {summarize(ratios(pairs))}, wanted {text.wanted}",
        flush=True,
    )
    if save:
        rows = [
            (text.name, f"{guessing.hit_rate:.3f}", f"{first:.3f}", f"{second:.3f}", f"{first / second:.4f}")
            for first, second in pairs
        ]
        header = ("text", "hit_rate", "guessing_tok_s", "plain_tok_s", "ratio")
        print("saved to", save_rows("guessing", header, rows))


if __name__ == "__main__":
    main()
