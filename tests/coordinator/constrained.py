"""Generation of replies from random choices of tokens: what the engine does for one sequence, without stages."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_k2.coordinator.reply_policy import NO_LIMITS, ReplyLimits, ReplyPolicy
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
TOKENIZER: Tokenizer = load_tokenizer(tiny_vocabulary(VOCAB_SIZE, max_position_embeddings=4096).files, VOCAB_SIZE)
COMPILER = GrammarCompiler(TOKENIZER)
STOP_ID = TOKENIZER.token_id("<|im_end|>")
THINK_ID, THINK_END_ID = TOKENIZER.token_id("<think>"), TOKENIZER.token_id("</think>")
INSTANT_PROMPT = (STOP_ID, THINK_ID, THINK_END_ID)
"""A prompt after which the reply begins with its content."""
ENDING_IDS = frozenset(
    token_id for token_id in range(VOCAB_SIZE) if TOKENIZER.token_bytes(token_id)[:1] in (b'"', b"}", b"]", b",")
)
"""The tokens whose first character can end a JSON value."""

TokenChoice = Callable[[Sequence[int]], int]
"""A function from the allowed token ids to one of them."""


@dataclass(frozen=True)
class GeneratedReply:
    """A reply: its tokens, its parts, and the reason of its end."""

    token_ids: list[int]
    reply: Reply
    finish_reason: FinishReason


def policy_of(
    constraint: Constraint,
    prompt_ids: Sequence[int] = INSTANT_PROMPT,
    limits: ReplyLimits = NO_LIMITS,
    stop_ids: frozenset[int] = frozenset({STOP_ID}),
) -> ReplyPolicy:
    """Return the policy of a constrained reply."""
    request = Request(tuple(prompt_ids), 4096, Sampling(seed=0), stop_ids)
    return ReplyPolicy(TOKENIZER, request, limits, compile_constraint(COMPILER, constraint))


def generate_reply(
    policy: ReplyPolicy,
    choose: TokenChoice,
    max_tokens: int = 400,
    stop_ids: frozenset[int] = frozenset({STOP_ID}),
    on_mask: Callable[[list[int], TokenMask | None], None] = lambda _ids, _mask: None,
) -> GeneratedReply:
    """Generate with a policy as a sequence does: its forced tokens, else the token that ``choose`` returns.

    ``on_mask`` is called before each choice with the tokens so far and the mask.
    """
    token_ids: list[int] = []
    parts: list[Part] = []
    reason: FinishReason | None = None
    while reason is None:
        next_ids = list(policy.forced())
        if not next_ids:
            mask = policy.token_mask(())
            on_mask(token_ids, mask)
            next_ids = [choose(allowed_ids(mask))]
        for token_id in next_ids:
            accepted = policy.accept(token_id)
            token_ids.append(token_id)
            parts += accepted.parts
            reason = FinishReason.STOP if token_id in stop_ids else accepted.finish_reason
            if reason is None and len(token_ids) >= max_tokens:
                reason = FinishReason.LENGTH
            if reason is not None:
                break
    parts += policy.finish().parts
    return GeneratedReply(token_ids, whole_reply(parts), reason)


def allowed_ids(mask: TokenMask | None) -> list[int]:
    """Return the tokens that a mask allows; None allows all."""
    return [token_id for token_id in range(VOCAB_SIZE) if mask is None or mask.allows(token_id)]


def random_choice(seed: int, *, ending: float = 0.0) -> TokenChoice:
    """Return a random choice. With the probability ``ending`` it is one of ENDING_IDS, if one is allowed."""
    rng = random.Random(seed)

    def choose(allowed: Sequence[int]) -> int:
        ending_ids = [token_id for token_id in allowed if token_id in ENDING_IDS] if rng.random() < ending else []
        return rng.choice(ending_ids or allowed)

    return choose
