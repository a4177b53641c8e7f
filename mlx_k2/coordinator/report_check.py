"""Checks of a stage's reports of steps and drafts, before anything is computed from them. Pure."""

import math

from mlx_k2.protocol.messages import Drafted, FromStage, StepDone
from mlx_k2.scheduling.microbatch import Microbatch


def find_problem(message: FromStage, expected: Microbatch | None, *, is_last: bool, vocab_size: int) -> str | None:
    """Return what is wrong with a stage's message, in words that follow the stage's name; None if nothing is.

    ``expected`` is the step that the stage must report next; None: it has reported all.
    """
    if not isinstance(message, StepDone):
        return f"sent a {type(message).__name__} between steps"
    if expected is None or message.number != expected.number:
        due = "nothing" if expected is None else f"step {expected.number}"
        return f"reported step {message.number}, and {due} is due"
    for seconds in (message.busy_s, message.receive_s, message.send_s):
        if not 0 <= seconds < math.inf:  # false for NaN, too
            return f"reported {seconds} s as a time of step {message.number}"
    if message.is_skipped and not all(planned.row.is_draft for planned in expected.rows):
        return f"skipped step {message.number}, which is not a draft"
    if message.is_skipped and is_last and any(planned.sequence.counts(message.number) for planned in expected.rows):
        return f"skipped step {message.number}, whose draft is right"
    is_sampling = is_last and not message.is_skipped
    num_sampled = sum(planned.row.needs_logits for planned in expected.rows) if is_sampling else 0
    if len(message.tokens) != num_sampled:
        return f"sent {len(message.tokens)} tokens in step {message.number}, in which it samples {num_sampled}"
    for token in message.tokens:
        for token_id in (token.token_id, *(top_id for top_id, _ in token.top)):
            if not 0 <= token_id < vocab_size:
                return f"sent the token id {token_id}, and the vocabulary has {vocab_size}"
    return None


def find_draft_problem(message: FromStage, expected: Microbatch, *, vocab_size: int) -> str | None:
    """Return what is wrong with the last stage's message after step ``expected``, which requests drafts.

    The result is as that of ``find_problem``.
    """
    if not isinstance(message, Drafted) or message.number != expected.number:
        return f"sent a {type(message).__name__} where the drafts after step {expected.number} are due"
    if not 0 <= message.busy_s < math.inf:  # false for NaN, too
        return f"reported {message.busy_s} s as the time of the drafts after step {message.number}"
    request = expected.rows[0].row.draft
    if request is None or len(message.token_ids) > request.num_tokens:
        return f"sent {len(message.token_ids)} drafts after step {message.number}, more than requested"
    for token_id in message.token_ids:
        if not 0 <= token_id < vocab_size:
            return f"sent the draft {token_id}, and the vocabulary has {vocab_size} tokens"
    return None
