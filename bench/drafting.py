"""Gain of n-gram draft tokens for one stream on two stages: on text that repeats itself, and on random text.

python -m bench.drafting [--save] [--pairs N] [--only WORDS]

The same request runs with drafts and without, in turn, on two deployments. The checkpoint's greedy text repeats in a
cycle (bench/checkpoints.py); its text at temperature 1 is random.
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

NUM_PROMPT_TOKENS = 32
NUM_TOKENS = 240
NUM_SKIPPED = 140
"""Tokens before the measured ones, in which the text begins to repeat itself."""


class MeasuredEngine:
    """An engine that runs one stream at a time.

    ``accepted_fraction`` is the fraction of the last stream's tokens that were accepted draft tokens.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.accepted_fraction = 0.0

    def rate(self, temperature: float) -> float:
        """Run one stream; return its tokens per second after the first NUM_SKIPPED."""
        sampling = Sampling(seed=0, temperature=temperature)
        request = Request(tuple(prompt_ids(NUM_PROMPT_TOKENS)), NUM_TOKENS, sampling, frozenset())
        events = list(self._engine.submit(request).events())
        arrivals = [event.arrived_at for event in events if isinstance(event, Token)]
        assert isinstance(events[-1], Finished)
        self.accepted_fraction = events[-1].summary.accepted / len(arrivals)
        return (len(arrivals) - 1 - NUM_SKIPPED) / (arrivals[-1] - arrivals[NUM_SKIPPED])


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    options = read_options(__doc__)
    with contextlib.ExitStack() as stack:
        drafting, plain = (start_engine(stack, mode) for mode in (DraftMode.NGRAM, DraftMode.OFF))
        for text, temperature, required in (("text that repeats itself", 0.0, 1.5), ("random text", 1.0, 0.95)):
            name = f"guesses over none, {text}"  # the name in the saved rows
            claim = Claim(name, partial(drafting.rate, temperature), partial(plain.rate, temperature), required)
            measure("drafting", claim, options)
            print(f"accepted draft tokens: {drafting.accepted_fraction:.2f} of the tokens", flush=True)


def start_engine(stack: contextlib.ExitStack, mode: DraftMode) -> MeasuredEngine:
    """Start an engine on two stages, both running until ``stack`` closes."""
    deployment = stack.enter_context(local_deployment(cycle_checkpoint(), 2))
    return MeasuredEngine(stack.enter_context(engine_on(deployment, draft_mode=mode)))


if __name__ == "__main__":
    main()
