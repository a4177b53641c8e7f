"""Pipeline of a model's stages in this process: a StepRunner for each, queues for the hops between them."""

import queue
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mlx_k2.model.draft_model import DraftModel
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.protocol.messages import Step, StepDone
from mlx_k2.sampling import REPETITION_WINDOW, SampledToken, Sampling
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.stage.draft_plans import DraftPlans
from mlx_k2.stage.drafting import Drafting
from mlx_k2.stage.step_runner import PlanLimits, StepRunner
from mlx_k2.testing.queue_transport import QueueTransport
from tests.model.chain import load_stage, split_layers
from tests.model.checkpoints import read_config
from tests.model.draft_heads import LoadedDraft, head_at

CONTEXT_TOKENS = 1024


class Pipeline:
    """Stages of one checkpoint in float32, which run one after the other on this thread. The first step has number 1.

    With the folder ``head`` the last stage has its draft head. ``hops[i]`` leads to stage i; the first and the last hop
    carry nothing.
    """

    def __init__(self, folder: Path, num_stages: int, num_slots: int = 4, head: Path | None = None) -> None:
        config = read_config(folder)
        loaded_head = None if head is None else LoadedDraft(head_at(head), folder)
        self.head: DraftModel | None = None
        self.hops: list[queue.SimpleQueue[mx.array]] = [queue.SimpleQueue() for _ in range(num_stages + 1)]
        self.runners = []
        for rank, layers in enumerate(split_layers(config.num_hidden_layers, num_stages)):
            cache = LatentCache(len(layers), num_slots, CONTEXT_TOKENS, config.cache_row_dim, mx.float32)
            model, plans, drafting = load_stage(folder, config, layers, cache), DraftPlans(), None
            if loaded_head is not None:
                model.feature_slices = loaded_head.slices(layers)
                if rank == num_stages - 1:
                    self.head = loaded_head.model(model, num_slots, CONTEXT_TOKENS)
                    drafting = Drafting(self.head, config.hidden_size, CONTEXT_TOKENS, plans)
            self.runners.append(
                StepRunner(
                    model,
                    QueueTransport(self.hops[rank], self.hops[rank + 1]),
                    PlanLimits(num_slots, CONTEXT_TOKENS, config.vocab_size),
                    first_layer=layers.start,
                    has_features=loaded_head is not None,
                    drafting=drafting,
                    plans=plans,
                )
            )
        self._num_steps = 0

    def step(self, *rows: Row) -> list[StepDone]:
        """Run one plan; return the answer of each stage."""
        self._num_steps += 1
        return [runner.run(Step(self._num_steps, rows)) for runner in self.runners]

    def expect(self, step: Step) -> None:
        """Deliver a plan to all stages without running it."""
        for runner in self.runners:
            runner.expect(step)

    def tokens(self, *rows: Row) -> tuple[SampledToken, ...]:
        """Run one plan; return the tokens that the last stage sampled. Check that the others sampled none."""
        *others, last = self.step(*rows)
        assert all(done.tokens == () for done in others)
        return last.tokens

    def generate(
        self, prompt: Sequence[int], sampling: Sampling, num_tokens: int, slot: int = 0, chunk_tokens: int = 64
    ) -> list[SampledToken]:
        """Run ``prompt`` in chunks; return the ``num_tokens`` tokens sampled after it."""
        token_ids = list(prompt)
        sampled: list[SampledToken] = []
        for start in range(0, len(prompt), chunk_tokens):
            chunk = tuple(prompt[start : start + chunk_tokens])
            is_last = start + len(chunk) == len(prompt)
            chunk_sampling = sampling if is_last else None
            row = Row(slot, start, chunk, is_prompt=True, sampling=chunk_sampling, recent_ids=recent_ids(token_ids))
            sampled += self.tokens(row)
        while len(sampled) < num_tokens:
            token_ids.append(sampled[-1].token_id)
            last, recent = tuple(token_ids[-1:]), recent_ids(token_ids)
            row = Row(slot, len(token_ids) - 1, last, is_prompt=False, sampling=sampling, recent_ids=recent)
            sampled += self.tokens(row)
        return sampled


def recent_ids(token_ids: Sequence[int]) -> tuple[int, ...]:
    """Return the last token ids, to which a repetition penalty applies."""
    return tuple(token_ids[-REPETITION_WINDOW:])
