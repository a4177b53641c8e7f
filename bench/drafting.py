"""Effect of draft tokens on a lone stream over two stages: on text that repeats itself, and on random text.

python -m bench.drafting [--save] [--pairs N] [--only WORDS]

Runs the same requests with drafts and without, one right after the other, on separate deployments. The checkpoint's
greedy text repeats in a cycle (bench/checkpoints.py); at temperature 1 it never does.
"""

import contextlib
from functools import partial

from bench.checkpoints import cycle_checkpoint
from bench.claims import Claim, measure, read_options
from bench.deployments import local_deployment
from bench.measure import prompt_ids
from mlx_k2.coordinator.engine import Engine, engine_on
from mlx_k2.coordinator.handle import Finished, Token
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import Request

PROMPT_TOKENS = 32
TOKENS = 240
SKIPPED = 140
"""Number of tokens before the measured ones: the text must first repeat itself."""


class Stream:
    """Streams that run one at a time on the same stages.

    ``accepted_fraction`` is the fraction of the last stream's tokens that were accepted draft tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.accepted_fraction = 0.0

    def rate(self, temperature: float) -> float:
        """Run one stream; return its tokens per second after the skipped ones."""
        sampling = Sampling(seed=0, temperature=temperature)
        request = Request(tuple(prompt_ids(PROMPT_TOKENS)), TOKENS, sampling, frozenset())
        events = list(self._engine.submit(request).events())
        arrivals = [event.arrived_at for event in events if isinstance(event, Token)]
        assert isinstance(events[-1], Finished)
        self.accepted_fraction = events[-1].summary.accepted / len(arrivals)
        return (len(arrivals) - 1 - SKIPPED) / (arrivals[-1] - arrivals[SKIPPED])


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    folder = cycle_checkpoint()
    with contextlib.ExitStack() as stack:
        drafting, plain = (
            Stream(
                stack.enter_context(
                    engine_on(
                        stack.enter_context(local_deployment(folder, 2)),
                        draft_mode=DraftMode.NGRAM if drafts else DraftMode.OFF,
                    )
                )
            )
            for drafts in (True, False)
        )
        for text, temperature, asked in (("text that repeats itself", 0.0, 1.5), ("random text", 1.0, 0.95)):
            name = f"guesses over none, {text}"
            claim = Claim(name, partial(drafting.rate, temperature), partial(plain.rate, temperature), asked)
            measure("drafting", claim, options)
            print(f"accepted draft tokens: {drafting.accepted_fraction:.2f} of the tokens", flush=True)


if __name__ == "__main__":
    main()
