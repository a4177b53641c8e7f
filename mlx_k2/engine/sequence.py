"""One request's tokens and how far they are computed. Knows no other sequence."""

from collections.abc import Sequence as Tokens

from mlx_k2.engine.request import FinishReason, Request
from mlx_k2.sampling import REPETITION_WINDOW


class Sequence:
    """A running request in its cache slot."""

    def __init__(self, request: Request, slot: int, context_tokens: int) -> None:
        self.request = request
        self.slot = slot
        self.token_ids = list(request.prompt_ids)
        self.num_planned = 0
        """Positions that are in the cache, or on their way there in a plan that was sent."""
        self.finish_reason: FinishReason | None = None
        self._end = min(len(request.prompt_ids) + request.max_tokens, context_tokens)

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def generated_ids(self) -> Tokens[int]:
        """Tokens drawn so far, a stop token included."""
        return self.token_ids[self.num_prompt :]

    @property
    def num_unplanned(self) -> int:
        """Known tokens that no plan has carried yet."""
        return len(self.token_ids) - self.num_planned

    @property
    def recent_ids(self) -> tuple[int, ...]:
        """The last tokens, which a repetition penalty looks at."""
        return tuple(self.token_ids[-REPETITION_WINDOW:])

    def append(self, token_id: int) -> None:
        """Take a drawn token, and finish if it is the last."""
        assert self.finish_reason is None, "a finished sequence got a token"
        self.token_ids.append(token_id)
        if token_id in self.request.stop_ids:
            self.finish_reason = FinishReason.STOP
        elif len(self.token_ids) >= self._end:
            self.finish_reason = FinishReason.LENGTH
