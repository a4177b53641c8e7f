"""Token policy: decides after each token of one sequence how the sequence continues. Knows no plans and no stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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


class TokenPolicy(Protocol):
    """Decisions between a sampled token and the next plan.

    A policy belongs to one sequence and is called on the engine thread only. It is pure and takes bounded time: other
    sequences wait for it. An exception in it ends its own sequence.
    """

    def accept(self, token_id: int) -> Accepted:
        """Record the next token of the answer, sampled or forced, and return what it completes."""

    def forced(self) -> Sequence[int]:
        """Return tokens that follow without sampling. Called at the start and after each accepted token."""

    def token_mask(self, draft_ids: Sequence[int]) -> TokenMask | None:
        """Return the mask for the token after the accepted ones and ``draft_ids``; None allows every token."""

    def may_draft(self, draft_ids: Sequence[int], token_id: int) -> bool:
        """Return whether ``token_id`` may follow ``draft_ids`` as a draft token."""

    def finish(self) -> Accepted:
        """Return the text and parts that were held back. Called once, when no token follows."""


class AnyToken:
    """The policy that allows every token and makes no text."""

    def accept(self, token_id: int) -> Accepted:  # noqa: ARG002 - the protocol's argument
        """Return nothing."""
        return _NOTHING

    def forced(self) -> Sequence[int]:
        """Force nothing."""
        return ()

    def token_mask(self, draft_ids: Sequence[int]) -> TokenMask | None:  # noqa: ARG002 - the protocol's argument
        """Allow every token."""
        return None

    def may_draft(self, draft_ids: Sequence[int], token_id: int) -> bool:  # noqa: ARG002 - the protocol's arguments
        """Allow every token."""
        return True

    def finish(self) -> Accepted:
        """Return nothing."""
        return _NOTHING


_NOTHING = Accepted()
