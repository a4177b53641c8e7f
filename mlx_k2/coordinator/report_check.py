"""Checks of a stage's reports of steps and drafts, before anything is computed from them. Pure."""

import math
from collections.abc import Sequence

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
    if not all(0 <= seconds < math.inf for seconds in (message.busy_s, message.receive_s, message.send_s)):
        return f"reported an impossible time of step {message.number}"
    if message.is_skipped and not all(planned.row.is_draft for planned in expected.rows):
        return f"skipped step {message.number}, which is not a draft"
    if message.is_skipped and is_last and any(planned.sequence.counts(message.number) for planned in expected.rows):
        return f"skipped step {message.number}, whose draft is right"
    is_sampling = is_last and not message.is_skipped
    num_sampled = sum(planned.row.needs_logits for planned in expected.rows) if is_sampling else 0
    if len(message.tokens) != num_sampled:
        return f"sent {len(message.tokens)} tokens in step {message.number}, in which it samples {num_sampled}"
    token_ids = [token.token_id for token in message.tokens]
    token_ids += [token_id for token in message.tokens for token_id, _ in token.top]
    return _find_wrong_token(token_ids, vocab_size)


def find_draft_problem(message: FromStage, expected: Microbatch, *, vocab_size: int) -> str | None:
    """Return what is wrong, as ``find_problem``, with the last stage's message after a step that requests drafts."""
    if not isinstance(message, Drafted) or message.number != expected.number:
        return f"sent a {type(message).__name__} where the drafts after step {expected.number} are due"
    if not 0 <= message.busy_s < math.inf:
        return f"reported an impossible time of the drafts after step {message.number}"
    request = expected.rows[0].row.draft
    if request is None or len(message.token_ids) > request.num_tokens:
        return f"sent {len(message.token_ids)} drafts after step {message.number}, more than requested"
    return _find_wrong_token(message.token_ids, vocab_size)


def _find_wrong_token(token_ids: Sequence[int], vocab_size: int) -> str | None:
    wrong = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
    return None if wrong is None else f"sent the token id {wrong}, and the vocabulary has {vocab_size}"
