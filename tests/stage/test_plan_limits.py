"""Tests that a plan that does not fit a stage is refused, with the value that does not fit."""

import pytest

from mlx_k2.errors import ProtocolError
from mlx_k2.protocol.messages import Step
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.stage.step_runner import PlanLimits

LIMITS = PlanLimits(num_slots=2, context_tokens=64, vocab_size=768)


def row(slot: int = 0, position: int = 0, token_ids: tuple[int, ...] = (5,), copy_from: int | None = None) -> Row:
    return Row(slot, position, token_ids, True, None, copy_from=copy_from)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Step(8, (row(slot=2),)), "step 8 does not fit this stage: slot 2 of 2"),
        (Step(8, (row(slot=-1),)), "slot -1 of 2"),
        (Step(8, (row(), row(copy_from=2))), "slot 2 of 2"),
        (Step(8, (row(position=60, token_ids=(5,) * 5),)), "positions 60 to 65 of 64"),
        (Step(8, (row(position=-1),)), "positions -1 to 0 of 64"),
        (Step(8, (row(token_ids=()),)), "positions 0 to 0 of 64"),
        (Step(8, (row(token_ids=(5, 768)),)), "token id 768 of 768"),
        (Step(8, (row(token_ids=(-1,)),)), "token id -1 of 768"),
        (Step(8, ()), "step 8 has no rows"),
        (Step(7, (row(),)), "step 7 was sent after step 7: plans come in one order"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Step, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        LIMITS.check(plan, last_number=7)


def test_a_plan_at_the_limits_of_slot_position_and_token_passes() -> None:
    LIMITS.check(Step(8, (row(slot=1, position=59, token_ids=(767,) * 5, copy_from=0), row())), last_number=7)
    LIMITS.check(Step(0, (row(),)), last_number=None)
