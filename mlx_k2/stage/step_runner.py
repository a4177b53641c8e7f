"""Execution of one step plan on one stage: receive, run the layers, send or sample. Knows no pipes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlx_k2.errors import NotFinite, ProtocolError
from mlx_k2.model.batch import Batch, Span
from mlx_k2.model.sampler import SamplingRequest, sample_tokens
from mlx_k2.model.stage_model import StageModel
from mlx_k2.protocol.guard_messages import Phase
from mlx_k2.protocol.messages import Drafted, Step, StepDone
from mlx_k2.sampling import SampledToken
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.stage.draft_plans import DraftPlans
from mlx_k2.stage.drafting import Drafting, FinishedStep
from mlx_k2.stage.transport import Transport
from mlx_k2.token_mask import MaskForm
from mlx_k2.weights.reader import is_finite


@dataclass(frozen=True)
class PlanLimits:
    """The sizes that a stage was loaded for. Step plans are checked against them, since MLX does not check indices."""

    num_slots: int
    context_tokens: int
    vocab_size: int

    def check(self, step: Step, last_number: int | None) -> None:
        """Check that a plan fits these sizes, and that its number is above ``last_number``, the last plan's.

        Raises:
            ProtocolError: the plan fails a check.
        """
        if last_number is not None and step.number <= last_number:
            raise ProtocolError(f"step {step.number} was sent after step {last_number}: plan numbers must increase")
        if not step.rows:
            raise ProtocolError(f"step {step.number} has no rows")
        for row in step.rows:
            if (problem := self._problem(row)) is not None:
                raise ProtocolError(f"step {step.number} does not fit this stage: {problem}")

    def _problem(self, row: Row) -> str | None:
        """Return the value of a row that does not fit, with its limit; None if all fit."""
        for slot in (row.slot, row.copy_from):
            if slot is not None and not 0 <= slot < self.num_slots:
                return f"slot {slot} of {self.num_slots}"
        if row.position < 0 or not row.token_ids or row.end > self.context_tokens:
            return f"positions {row.position} to {row.end} of {self.context_tokens}"
        if (problem := self._sampling_problem(row)) is not None:
            return problem
        wrong_id = next((token_id for token_id in row.token_ids if not 0 <= token_id < self.vocab_size), None)
        return None if wrong_id is None else f"token id {wrong_id} of {self.vocab_size}"

    def _sampling_problem(self, row: Row) -> str | None:
        mask, bias = row.token_mask, row.logit_bias
        id_bytes = b"" if bias is None else bias.token_ids
        if bias is not None and (len(id_bytes) % 4 or len(id_bytes) != len(bias.values)):  # uint32 and float32
            return f"a logit bias of {len(id_bytes)} bytes of ids and {len(bias.values)} of values"
        if mask is not None and mask.form is MaskForm.BITS:
            if len(mask.data) != -(-self.vocab_size // 8):
                return f"a token mask of {len(mask.data)} bytes for {self.vocab_size} tokens"
        elif mask is not None:
            if len(mask.data) % 4:
                return f"a token mask of {len(mask.data)} bytes of ids"
            id_bytes += mask.data
        largest_id = max(memoryview(id_bytes).cast("I"), default=0)
        if largest_id >= self.vocab_size:
            return f"token id {largest_id} of {self.vocab_size} in a mask or bias"
        return None


class _StepInput(NamedTuple):
    """The array from the previous stage, and its two parts. On the first stage: the embedded tokens, and zeros."""

    received: mx.array
    hidden: mx.array  # (tokens, hidden)
    features: mx.array | None  # (tokens, hidden); None without a draft head


class StepRunner:
    """Runner of one stage's part of every step.

    Its state is the model's cache, the number of the last step, the token that it sampled last in each slot, and the
    drafts in ``plans``, the plans that have arrived. With ``has_features`` a hop carries twice as many vectors: the
    hidden states, then the features of a draft head. ``drafting`` is this draft head, on the last stage only.
    """

    def __init__(
        self,
        model: StageModel,
        transport: Transport,
        limits: PlanLimits,
        *,
        first_layer: int = 0,
        has_features: bool = False,
        drafting: Drafting | None = None,
        plans: DraftPlans | None = None,
    ) -> None:
        self._model = model
        self._transport = transport
        self._limits = limits
        self._last_number: int | None = None
        self._is_first, self._is_last = model.embedding is not None, model.head is not None
        self._first_layer = first_layer
        self._has_features = has_features
        self._drafting = drafting
        self._plans = plans or DraftPlans()
        self._sampled: dict[int, tuple[int, int]] = {}  # by slot: position and id of the token sampled last
        self._finished: FinishedStep | None = None

    def expect(self, step: Step) -> None:
        """Record a plan that has arrived and will be run later. The thread that reads messages may call this."""
        self._plans.add(step)

    def run(self, step: Step, report_phase: Callable[[Phase], None] = lambda _: None) -> StepDone:
        """Run the step and return its tokens and times. ``report_phase`` is called with each phase when it begins.

        Raises:
            ProtocolError: the step does not fit this stage (`PlanLimits.check`).
            NotFinite: the output, the logits or the cached rows have NaN or infinity; names where they occur first.
        """
        self._limits.check(step, self._last_number)
        self._last_number = step.number
        start_s = time.perf_counter()
        report_phase(Phase.COMPUTING if self._is_first else Phase.RECEIVING)
        if self._is_wrong_draft(step):
            return self._skip(step, report_phase)
        batch = Batch([Span(row.slot, row.position, len(row.token_ids), row.is_prompt) for row in step.rows])
        self._copy_positions(step.rows)
        step_input = self._input(step.rows, batch)
        output, features, receive_s = self._run_layers(step_input, batch, report_phase)
        tokens: tuple[SampledToken, ...] = ()
        if self._is_last:
            tokens, total = self._sample(step.rows, output, batch)
        else:
            total = mx.sum(output)  # NaN or infinite if one value is
            output = output if features is None else mx.concatenate([output, features])
            mx.eval(output, total)
        if not is_finite(total):
            raise NotFinite(f"NaN or infinity in step {step.number}, {self._origin(step_input.hidden, batch)}")
        send_s = 0.0 if self._is_last else self._send(output, report_phase)
        if self._drafting is not None and features is not None:
            self._finished = FinishedStep(step, batch, features, tokens)
        busy_s = time.perf_counter() - start_s - receive_s - send_s
        return StepDone(step.number, busy_s, receive_s, send_s, tokens, mx.get_peak_memory())

    def draft(self) -> Drafted | None:
        """Run the draft head on the last step's tokens. Return its drafts if the step requested some.

        Call this after the step's StepDone was sent, so that no token waits for the head.
        """
        finished, self._finished = self._finished, None
        return None if finished is None or self._drafting is None else self._drafting.finish(finished)

    def _run_layers(
        self, step_input: _StepInput, batch: Batch, report_phase: Callable[[Phase], None]
    ) -> tuple[mx.array, mx.array | None, float]:
        """Return the layers' output, the features after them, and the seconds of waiting for the hidden states."""
        receive_s = 0.0
        builds_lazily = self._model.builds_lazily(batch)
        if not builds_lazily and not self._is_first:
            receive_s = _evaluate(step_input.received)
            report_phase(Phase.COMPUTING)
        output, features = self._model.run(step_input.hidden, batch, step_input.features)
        if builds_lazily and not self._is_first:  # the graph was built while the hidden states were on their way
            receive_s = _evaluate(step_input.received)  # complete before a GPU gets work that needs them
            report_phase(Phase.COMPUTING)
        return output, features, receive_s

    def _is_wrong_draft(self, step: Step) -> bool:
        """Return whether the step is a draft that is known to be wrong."""
        row = step.rows[0]  # a step with a draft has no other row
        if not row.is_draft:
            return False
        differs = self._is_last and self._sampled.get(row.slot) != (row.position, row.token_ids[0])
        return differs or self._plans.is_undone(step.number, row)

    def _skip(self, step: Step, report_phase: Callable[[Phase], None]) -> StepDone:
        """Receive a step's hidden states and send zeros in their place, because every hop carries every step."""
        receive_s = send_s = 0.0
        shape = self._hop_shape(sum(len(row.token_ids) for row in step.rows))
        if not self._is_first:
            receive_s = _evaluate(self._transport.receive(shape, self._model.cache.dtype))
        if not self._is_last:
            zeros = mx.zeros(shape, self._model.cache.dtype)
            mx.eval(zeros)
            send_s = self._send(zeros, report_phase)
        return StepDone(step.number, 0.0, receive_s, send_s, is_skipped=True)

    def _copy_positions(self, rows: tuple[Row, ...]) -> None:
        for row in rows:
            if row.copy_from is not None:
                self._model.cache.copy(row.copy_from, row.slot, row.position)
                if self._drafting is not None:
                    self._drafting.copy_positions(row.copy_from, row.slot, row.position)

    def _hop_shape(self, num_tokens: int) -> tuple[int, int]:
        return num_tokens * (2 if self._has_features else 1), self._model.config.hidden_size

    def _input(self, rows: tuple[Row, ...], batch: Batch) -> _StepInput:
        """Return the step's input, lazily: it may not have arrived."""
        if self._is_first:
            hidden = self._model.embed(mx.array([token_id for row in rows for token_id in row.token_ids]))
            return _StepInput(hidden, hidden, mx.zeros_like(hidden) if self._has_features else None)
        num_tokens = batch.num_tokens
        received = self._transport.receive(self._hop_shape(num_tokens), self._model.cache.dtype)
        features = received[num_tokens:] if self._has_features else None
        return _StepInput(received, received[:num_tokens], features)

    def _send(self, output: mx.array, report_phase: Callable[[Phase], None]) -> float:
        """Send an evaluated array to the next stage. Return the seconds that this took."""
        report_phase(Phase.SENDING)
        start_s = time.perf_counter()
        self._transport.send(output)
        return time.perf_counter() - start_s

    def _sample(
        self, rows: tuple[Row, ...], output: mx.array, batch: Batch
    ) -> tuple[tuple[SampledToken, ...], mx.array]:
        """Sample a token from the last position of each row that requests one. If none does, only write the cache.

        Return the tokens, and a sum that is NaN or infinite if a logit or a cache row of the step is.
        """
        last_indices, requests = [], []
        num_tokens = 0
        for row in rows:
            num_tokens += len(row.token_ids)
            if row.sampling is not None:
                last_indices.append(num_tokens - 1)
                requests.append(SamplingRequest(row.sampling, row.end, row.recent_ids, row.token_mask, row.logit_bias))
        if not requests:
            total = self._model.cache_total(batch)
            mx.eval(total, self._model.cache.arrays)  # the pending writes, without the last layer's output
            return (), total
        logits = self._model.logits(output[mx.array(last_indices)])
        total = mx.sum(logits)
        if len(requests) < num_tokens:  # some positions have no logits
            total = total + self._model.cache_total(batch)
        mx.async_eval(total)
        tokens = tuple(sample_tokens(logits, requests))
        slots = (row.slot for row in rows if row.needs_logits)
        for slot, request, token in zip(slots, requests, tokens, strict=True):
            self._sampled[slot] = request.position, token.token_id
        return tokens, total

    def _origin(self, hidden: mx.array, batch: Batch) -> str:
        """Return where the first NaN or infinity of a step occurs, and the advice. Runs the layers again."""
        if not is_finite(mx.sum(hidden)):
            where = "the embedding" if self._is_first else "the output of the previous stage"
        else:
            index = self._model.first_broken_layer(hidden, batch)
            where = "the head" if index is None else f"layer {self._first_layer + index}"
        return (
            f"first in {where}: its weights or its memory are broken: run with --check-weights, or "
            "`mlx-k2 doctor --deep` with the same --hostfile and --model"
        )


def _evaluate(array: mx.array) -> float:
    """Evaluate an array. Return the seconds that this took."""
    start_s = time.perf_counter()
    mx.eval(array)
    return time.perf_counter() - start_s
