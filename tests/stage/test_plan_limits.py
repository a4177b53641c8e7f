"""Tests of the limits of step plans: a plan that exceeds a limit of the stage is refused, and the value is named."""

import msgspec
import pytest

from mlx_k2.errors import ProtocolError
from mlx_k2.protocol.messages import Step
from mlx_k2.sampling import LogitBias
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.stage.step_runner import PlanLimits
from mlx_k2.token_mask import MaskForm, TokenMask

LIMITS = PlanLimits(num_slots=2, context_tokens=64, vocab_size=768)


def row(slot: int = 0, position: int = 0, token_ids: tuple[int, ...] = (5,), copy_from: int | None = None) -> Row:
    return Row(slot, position, token_ids, is_prompt=True, sampling=None, copy_from=copy_from)


def with_mask(mask: TokenMask) -> Row:
    return msgspec.structs.replace(row(), token_mask=mask)


def with_bias(bias: LogitBias) -> Row:
    return msgspec.structs.replace(row(), logit_bias=bias)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Step(8, (row(slot=2),)), "step 8 does not fit this stage: slot 2 of 2"),
        (Step(8, (row(slot=-1),)), "slot -1 of 2"),
        (Step(8, (row(), row(copy_from=2))), "slot 2 of 2"),
        (Step(8, (row(position=60, token_ids=(5,) * 5),)), "positions 60 to 65 of 64"),
        (Step(8, (row(position=-1),)), "positions -1 to 0 of 64"),
        (Step(8, (row(token_ids=()),)), "positions 0 to 0 of 64"),
        (Step(8, (row(token_ids=(5, 768)),)), "token id 768 of 768"),
        (Step(8, (row(token_ids=(-1,)),)), "token id -1 of 768"),
        (Step(8, (with_mask(TokenMask(MaskForm.BITS, b"a" * 95)),)), "a token mask of 95 bytes for 768 tokens"),
        (Step(8, (with_mask(TokenMask(MaskForm.ONLY, b"abcde")),)), "a token mask of 5 bytes of ids"),
        (Step(8, (with_mask(TokenMask.all_but([1, 768])),)), "token id 768 of 768 in a mask or bias"),
        (Step(8, (with_bias(LogitBias.of({768: 1.0})),)), "token id 768 of 768 in a mask or bias"),
        (Step(8, (with_bias(LogitBias(bytes(8), bytes(4))),)), "a logit bias of 8 bytes of ids and 4 of values"),
        (Step(8, (with_bias(LogitBias(bytes(3), bytes(3))),)), "a logit bias of 3 bytes of ids and 3 of values"),
        (Step(8, ()), "step 8 has no rows"),
        (Step(7, (row(),)), "step 7 was sent after step 7: plan numbers must increase"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Step, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        LIMITS.check(plan, last_number=7)


def test_a_plan_at_the_limits_of_slot_position_and_token_passes() -> None:
    LIMITS.check(Step(8, (row(slot=1, position=59, token_ids=(767,) * 5, copy_from=0), row())), last_number=7)
    LIMITS.check(Step(0, (row(),)), last_number=None)
    masks = (TokenMask(MaskForm.BITS, bytes(96)), TokenMask.only([0, 767]), TokenMask.all_but([]))
    LIMITS.check(Step(0, tuple(with_mask(mask) for mask in masks)), last_number=None)
    LIMITS.check(Step(0, (with_bias(LogitBias.of({767: -1.0})),)), last_number=None)
