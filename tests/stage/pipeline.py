"""All stages of a model in this process: one StepRunner each, with queues for hops, run one after the other."""

import queue
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.protocol.messages import Step, StepDone
from mlx_k2.sampling import REPETITION_WINDOW, SampledToken, Sampling
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.stage.step_runner import PlanLimits, StepRunner
from mlx_k2.testing.queue_transport import QueueTransport
from tests.model.chain import load_stage, split_layers
from tests.model.checkpoints import read_config


class Pipeline:
    """The stages of one checkpoint in float32 on this thread."""

    def __init__(self, folder: Path, num_stages: int, num_slots: int = 4) -> None:
        config = read_config(folder)
        hops: list[queue.SimpleQueue[mx.array]] = [queue.SimpleQueue() for _ in range(num_stages + 1)]
        self.runners = []
        for rank, layers in enumerate(split_layers(config.num_hidden_layers, num_stages)):
            cache = LatentCache(len(layers), num_slots, 1024, config.latent_dim, mx.float32)
            self.runners.append(
                StepRunner(
                    load_stage(folder, config, layers, cache),
                    QueueTransport(hops[rank], hops[rank + 1]),
                    PlanLimits(num_slots, 1024, config.vocab_size),
                    is_first=rank == 0,
                    is_last=rank == num_stages - 1,
                    hidden_size=config.hidden_size,
                    dtype=mx.float32,
                    first_layer=layers.start,
                )
            )
        self._num_steps = 0

    def step(self, *rows: Row) -> list[StepDone]:
        """Run one plan and return the answer of each stage."""
        self._num_steps += 1
        return [runner.run(Step(self._num_steps, rows)) for runner in self.runners]

    def tokens(self, *rows: Row) -> tuple[SampledToken, ...]:
        """Run one plan and return the tokens of the last stage. The others sample nothing."""
        *others, last = self.step(*rows)
        assert all(done.tokens == () for done in others)
        return last.tokens

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, num_tokens: int, slot: int = 0, chunk_tokens: int = 64
    ) -> list[SampledToken]:
        """Return the tokens after ``prompt``, which is run in chunks."""
        token_ids = list(prompt)
        sampled: list[SampledToken] = []
        for start in range(0, len(prompt), chunk_tokens):
            chunk = tuple(prompt[start : start + chunk_tokens])
            wanted = sampling if start + len(chunk) == len(prompt) else None
            sampled += self.tokens(Row(slot, start, chunk, True, wanted, recent(token_ids)))
        while len(sampled) < num_tokens:
            token_ids.append(sampled[-1].token_id)
            row = Row(slot, len(token_ids) - 1, tuple(token_ids[-1:]), False, sampling, recent(token_ids))
            sampled += self.tokens(row)
        return sampled


def recent(token_ids: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens that a repetition penalty applies to."""
    return tuple(token_ids[-REPETITION_WINDOW:])
