"""What a plan may ask of a stage, checked before it computes: MLX does not look whether an index is in range."""

from dataclasses import dataclass

from mlx_k2.errors import ProtocolError
from mlx_k2.protocol.messages import Step
from mlx_k2.scheduling.microbatch import Row


@dataclass(frozen=True)
class PlanLimits:
    """What the stage was loaded for."""

    num_slots: int
    context_tokens: int
    vocab_size: int

    def check(self, step: Step, last_number: int | None) -> None:
        """Refuse a plan that does not fit, or does not come after number ``last_number``.

        Raises:
            ProtocolError: says what does not fit.
        """
        if last_number is not None and step.number <= last_number:
            raise ProtocolError(f"step {step.number} was sent after step {last_number}: plans come in one order")
        if not step.rows:
            raise ProtocolError(f"step {step.number} has no rows")
        for row in step.rows:
            if (problem := self._problem(row)) is not None:
                raise ProtocolError(f"step {step.number} does not fit this stage: {problem}")

    def _problem(self, row: Row) -> str | None:
        for slot in (row.slot, row.slot if row.copy_from is None else row.copy_from):
            if not 0 <= slot < self.num_slots:
                return f"slot {slot} of {self.num_slots}"
        end = row.position + len(row.token_ids)
        if row.position < 0 or not row.token_ids or end > self.context_tokens:
            return f"positions {row.position} to {end} of {self.context_tokens}"
        wrong = next((token_id for token_id in row.token_ids if not 0 <= token_id < self.vocab_size), None)
        return None if wrong is None else f"token id {wrong} of {self.vocab_size}"
