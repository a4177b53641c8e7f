"""Checks of what a stage reports between steps, before anything is computed from it. Pure."""

import math

from mlx_k2.protocol.messages import FromStage, StepDone
from mlx_k2.scheduling.microbatch import Microbatch


def find_problem(message: FromStage, expected: Microbatch | None, *, is_last: bool, vocab_size: int) -> str | None:
    """Return what is wrong with a stage's message, as a predicate of the stage; None if nothing is.

    ``expected`` is the step that the stage must report next; None: it has reported all.
    """
    if not isinstance(message, StepDone):
        return f"sent a {type(message).__name__} between steps"
    if expected is None or message.number != expected.number:
        owed = "nothing" if expected is None else f"step {expected.number}"
        return f"reported step {message.number}, and {owed} is due"
    times = (message.busy_s, message.receive_s, message.send_s)
    if not all(math.isfinite(seconds) and seconds >= 0 for seconds in times):
        return f"reported a time of step {message.number} that is none"
    wanted = sum(planned.row.needs_logits for planned in expected.rows) if is_last else 0
    if len(message.tokens) != wanted:
        return f"sent {len(message.tokens)} tokens in step {message.number}, in which it samples {wanted}"
    ids = [token_id for token in message.tokens for token_id in (token.token_id, *(found for found, _ in token.top))]
    wrong = next((number for number in ids if not 0 <= number < vocab_size), None)
    return None if wrong is None else f"sent the token id {wrong}, and the model has {vocab_size}"
