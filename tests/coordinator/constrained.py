"""Replies of a token policy to random logits: what the engine does for one sequence, without stages."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_k2.coordinator.reply_policy import ReplyLimits, ReplyPolicy
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from mlx_k2.text.constraint import Constraint
from mlx_k2.text.grammar import GrammarCompiler
from mlx_k2.text.reply_grammar import compile_constraint
from mlx_k2.text.reply_parts import Part, Reply, whole_reply
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from mlx_k2.token_mask import TokenMask

VOCAB_SIZE = 640
TOKENIZER: Tokenizer = load_tokenizer(tiny_vocabulary(VOCAB_SIZE, 4096).files, VOCAB_SIZE)
COMPILER = GrammarCompiler(TOKENIZER)
STOP_ID = TOKENIZER.token_id("<|im_end|>")
THINK, THINK_END = TOKENIZER.token_id("<think>"), TOKENIZER.token_id("</think>")
NO_THINKING = (STOP_ID, THINK, THINK_END)
"""A prompt that ends with an empty reasoning."""
ENDING = frozenset(
    number for number in range(VOCAB_SIZE) if TOKENIZER.token_bytes(number)[:1] in (b'"', b"}", b"]", b",")
)
"""The tokens that end values."""

Choose = Callable[[Sequence[int]], int]
"""A function that returns one of the allowed tokens."""


@dataclass(frozen=True)
class WrittenReply:
    """A reply: its tokens, its parts, and why it ended."""

    token_ids: list[int]
    reply: Reply
    finish_reason: FinishReason


def policy_of(
    constraint: Constraint,
    prompt_ids: Sequence[int] = NO_THINKING,
    limits: ReplyLimits | None = None,
    stop_ids: frozenset[int] = frozenset({STOP_ID}),
) -> ReplyPolicy:
    """Return the policy of a constrained reply."""
    request = Request(tuple(prompt_ids), 4096, Sampling(seed=0), stop_ids)
    grammar = compile_constraint(COMPILER, constraint)
    return ReplyPolicy(TOKENIZER, request, limits or ReplyLimits(), grammar)


def write_reply(
    policy: ReplyPolicy,
    choose: Choose,
    max_tokens: int,
    stop_ids: frozenset[int] = frozenset({STOP_ID}),
    on_mask: Callable[[list[int], TokenMask | None], None] = lambda _ids, _mask: None,
) -> WrittenReply:
    """Run a policy as a sequence does: with forced tokens, else with one that ``choose`` returns of those allowed.

    ``on_mask`` is called with the tokens so far and the mask before each choice.
    """
    token_ids: list[int] = []
    parts: list[Part] = []
    reason: FinishReason | None = None
    while reason is None:
        forced = list(policy.forced())
        if not forced:
            mask = policy.token_mask(())
            on_mask(token_ids, mask)
            forced = [choose(allowed_ids(mask))]
        for token_id in forced:
            accepted = policy.accept(token_id)
            token_ids.append(token_id)
            parts += accepted.parts
            reason = FinishReason.STOP if token_id in stop_ids else accepted.finish_reason
            if reason is None and len(token_ids) >= max_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                break
    parts += policy.finish().parts
    assert reason in (FinishReason.STOP, FinishReason.LENGTH)
    return WrittenReply(token_ids, whole_reply(parts), reason)


def allowed_ids(mask: TokenMask | None) -> list[int]:
    """Return the tokens that a mask allows."""
    return [number for number in range(VOCAB_SIZE) if mask is None or mask.allows(number)]


def random_choice(seed: int, *, ending: float = 0.0) -> Choose:
    """Return a choice by random logits; with the probability ``ending`` a token that ends values, if one is allowed."""
    rng = random.Random(seed)

    def choose(allowed: Sequence[int]) -> int:
        preferred = [number for number in allowed if number in ENDING] if rng.random() < ending else []
        return rng.choice(preferred or allowed)

    return choose
