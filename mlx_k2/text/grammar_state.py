"""The state of a compiled grammar in one reply: the tokens that may follow the accepted ones. Knows no schema."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from mlx_k2.errors import RequestFailed
from mlx_k2.token_mask import MaskForm, TokenMask

_Result = TypeVar("_Result")
_REPLAY_CHUNK_TOKENS = 32
"""Tokens after which the fuel of a new lexer is reset, while it accepts the tokens of the old one."""


@dataclass(frozen=True)
class AllowedTokens:
    """The ordinary tokens that may follow, and whether the grammar's text may end here."""

    words: NDArray[np.int32]
    """A bit for each token: bit ``id % 32`` of word ``id // 32``."""
    num_tokens: int
    may_end: bool

    def mask(self, control_ids: Sequence[int], vocab_size: int) -> TokenMask:
        """Return the mask that allows these tokens and the control tokens ``control_ids``."""
        words = self.words
        if control_ids:
            words = words.copy()
            bits = words.view(np.uint8)
            for token_id in control_ids:
                bits[token_id // 8] |= 1 << token_id % 8
        if 4 * (self.num_tokens + len(control_ids)) < vocab_size // 8:  # the ids need fewer bytes than the bits
            return TokenMask(MaskForm.ONLY, _ids(words).tobytes())
        return TokenMask(MaskForm.BITS, words.tobytes()[: -(-vocab_size // 8)])

    @property
    def token_ids(self) -> NDArray[np.uint32]:
        """The ids of the tokens that may follow."""
        return _ids(self.words)


def _ids(words: NDArray[np.int32]) -> NDArray[np.uint32]:
    """Return the token ids whose bits are set."""
    nonzero = np.flatnonzero(words)
    bits = np.unpackbits(words[nonzero].view(np.uint8), bitorder="little").reshape(-1, 32)
    rows, columns = np.nonzero(bits)
    return (nonzero[rows] * 32 + columns).astype(np.uint32)


class CompiledGrammar:
    """A compiled grammar. Copies of its matcher share a lexer: if one exceeds the lexer's limits, all copies fail."""

    def __init__(self, make: Callable[[], LLMatcher]) -> None:
        self._make = make
        self.matcher = make()

    def replace(self, failed: LLMatcher) -> LLMatcher:
        """Return a matcher that does not share the lexer of ``failed``."""
        if self.matcher is failed:
            self.matcher = self._make()
        return self.matcher


class GrammarState:
    """The state of a grammar in one reply: the tokens that it has accepted. Not thread-safe.

    Its methods raise RequestFailed if the grammar exceeds its limits. ``ordinary`` has a bit for each ordinary token.
    """

    def __init__(self, compiled: CompiledGrammar, ordinary: NDArray[np.int32]) -> None:
        self._compiled = compiled
        self._ordinary = ordinary
        self._initial_matcher = compiled.matcher
        self._matcher = self._initial_matcher.deep_copy()
        self._token_ids: list[int] = []

    def copy(self) -> "GrammarState":
        """Return a state that is independent of this one."""
        new = copy.copy(self)
        new._matcher, new._token_ids = self._matcher.deep_copy(), self._token_ids.copy()
        return new

    def accept(self, token_id: int) -> None:
        """Add the next token, which the grammar allows."""
        self._run(lambda matcher: matcher.consume_token(token_id))
        self._token_ids.append(token_id)

    def allowed(self, draft_ids: Sequence[int] = ()) -> AllowedTokens:
        """Return the tokens that may follow the accepted tokens and then ``draft_ids``, which the grammar must allow.

        The state does not change, even if the draft tokens cause an error.
        """
        if draft_ids:
            state = self.copy()
            for token_id in draft_ids:
                state.accept(token_id)
            return state.allowed()
        words = np.zeros((1, len(self._ordinary)), np.int32)
        self._run(lambda matcher: fill_next_token_bitmask(matcher, words))
        may_end = self._run(LLMatcher.is_accepting)
        words[0] &= self._ordinary
        num_tokens = int(np.bitwise_count(words.view(np.uint32)).sum())
        if not num_tokens and not may_end:
            raise RequestFailed("request ended: its grammar allows no token here")
        return AllowedTokens(words[0], num_tokens, may_end)

    def forced(self) -> list[int]:
        """Return the tokens that must follow, as the tokenizer encodes their text; [] for a choice, or for the end."""
        token_ids = self._run(LLMatcher.compute_ff_tokens)
        are_ordinary = all(self._ordinary[token_id // 32] >> token_id % 32 & 1 for token_id in token_ids)
        return token_ids if are_ordinary else []

    def _run(self, step: Callable[[LLMatcher], _Result]) -> _Result:
        """Return the result of a step. Try again with a new lexer after an error: another reply may have caused it."""
        result = step(self._matcher)
        if self._matcher.is_error():
            self._replace_matcher()
            result = step(self._matcher)
        if self._matcher.is_error():
            problem = self._matcher.get_error().splitlines()[0]
            self._compiled.replace(self._initial_matcher)  # so that other replies get a new lexer
            raise RequestFailed(f"request ended: its grammar cannot follow the answer: {problem}")
        return result

    def _replace_matcher(self) -> None:
        """Use a new matcher with the same accepted tokens."""
        self._initial_matcher = self._compiled.replace(self._initial_matcher)
        self._matcher = self._initial_matcher.deep_copy()
        for start in range(0, len(self._token_ids), _REPLAY_CHUNK_TOKENS):
            self._matcher.consume_tokens(self._token_ids[start : start + _REPLAY_CHUNK_TOKENS])
            self._matcher.compute_bitmask()  # this resets the fuel
