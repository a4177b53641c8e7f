"""Token policy: decides after each token how its sequence continues. Knows no plans and no stages."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_k2.scheduling.request import FinishReason
from mlx_k2.text.reply_parts import Part
from mlx_k2.token_mask import TokenMask


@dataclass(frozen=True)
class Accepted:
    """Result of a policy for one token: the text and the reply parts that it completes, and why the sequence ends."""

    text: str = ""
    parts: tuple[Part, ...] = ()
    finish_reason: FinishReason | None = None
    """None: the sequence continues."""


class TokenPolicy:
    """Decisions between a sampled token and the next plan. This base class allows every token and makes no text.

    A policy belongs to one sequence and is called on the engine thread only. It is pure and takes bounded time: other
    sequences wait for it. An exception in it ends its own sequence.
    """

    def accept(self, token_id: int) -> Accepted:  # noqa: ARG002 - for subclasses
        """Record the next token of the answer, sampled or forced, and return what it completes."""
        return Accepted()

    def forced(self) -> Sequence[int]:
        """Return tokens that follow without sampling, if any. Called at the start, and after tokens were accepted."""
        return ()

    def token_mask(self, draft_ids: Sequence[int]) -> TokenMask | None:  # noqa: ARG002 - for subclasses
        """Return the mask for the token after the accepted ones and ``draft_ids``; None allows every token."""
        return None

    def may_draft(self, draft_ids: Sequence[int], token_id: int) -> bool:  # noqa: ARG002 - for subclasses
        """Return whether ``token_id`` may follow ``draft_ids`` as a draft token."""
        return True

    def finish(self) -> Accepted:
        """Return the text and parts that were held back until now. Called once, when no token follows."""
        return Accepted()
