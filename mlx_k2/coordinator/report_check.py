"""Checks of what a stage reports between steps, before anything is computed from it. Pure."""

import math

from mlx_k2.protocol.messages import Drafted, FromStage, StepDone
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
    if message.is_skipped and not all(planned.row.is_draft for planned in expected.rows):
        return f"skipped step {message.number}, which is not a draft"
    if message.is_skipped and is_last and any(planned.sequence.counts(message.number) for planned in expected.rows):
        return f"skipped step {message.number}, whose draft is right"
    is_sampling = is_last and not message.is_skipped
    wanted = sum(planned.row.needs_logits for planned in expected.rows) if is_sampling else 0
    if len(message.tokens) != wanted:
        return f"sent {len(message.tokens)} tokens in step {message.number}, in which it samples {wanted}"
    ids = [token_id for token in message.tokens for token_id in (token.token_id, *(found for found, _ in token.top))]
    wrong = next((number for number in ids if not 0 <= number < vocab_size), None)
    return None if wrong is None else f"sent the token id {wrong}, and the model has {vocab_size}"


def find_draft_problem(message: FromStage, asked: Microbatch, *, vocab_size: int) -> str | None:
    """Return what is wrong with the last stage's message after step ``asked``, which requests drafts, as above."""
    if not isinstance(message, Drafted) or message.number != asked.number:
        return f"sent a {type(message).__name__} where the drafts after step {asked.number} are due"
    if not (math.isfinite(message.busy_s) and message.busy_s >= 0):
        return f"reported a time of the drafts after step {message.number} that is none"
    request = asked.rows[0].row.draft
    if request is None or len(message.token_ids) > request.num_tokens:
        return f"sent {len(message.token_ids)} drafts after step {message.number}, more than requested"
    wrong = next((token_id for token_id in message.token_ids if not 0 <= token_id < vocab_size), None)
    return None if wrong is None else f"sent the draft {wrong}, and the model has {vocab_size} tokens"
