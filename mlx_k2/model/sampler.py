"""Sampling of the next token of each row from its logits. Knows no sequences: each row carries its parameters.

The order is mlx-lm's: repetition penalty and logit bias on the logits; top-p, min-p and top-k on the
log-probabilities; then the temperature. The token is the largest of log-probabilities plus Gumbel noise, whose
random key is derived from (seed, position) only: a token does not depend on the other rows of its step, and a draft
head with the same noise often samples the same token (docs/design/0121).
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_k2.sampling import REPETITION_WINDOW, LogitBias, SampledToken, Sampling
from mlx_k2.token_mask import MaskForm, TokenMask


@dataclass(frozen=True)
class SamplingRequest:
    """One row's parameters. ``position`` is that of the token to sample; ``recent_ids`` are the tokens before it.

    ``token_mask`` None allows every token.
    """

    sampling: Sampling
    position: int
    recent_ids: tuple[int, ...]
    token_mask: TokenMask | None = None
    logit_bias: LogitBias | None = None


def sample_tokens(logits: mx.array, requests: Sequence[SamplingRequest]) -> list[SampledToken]:
    """Sample one token per row of logits (rows, vocabulary) float32, with one request per row. Evaluate the result."""
    if any(request.token_mask is not None for request in requests):
        logits = mx.concatenate([_masked(logits[row : row + 1], request) for row, request in enumerate(requests)])
    tokens = mx.concatenate([_token(logits[row : row + 1], request) for row, request in enumerate(requests)])
    logprobs = [_logprobs(logits[row], request.sampling) for row, request in enumerate(requests)]
    mx.eval(tokens, logprobs)
    return [
        _sampled_token(token_id, found) for token_id, found in zip(np.asarray(tokens).tolist(), logprobs, strict=True)
    ]


def sample_draft(logits: mx.array, request: SamplingRequest) -> int:
    """Return the token of a draft head's logits (1, vocabulary) with the filters and the noise of the target's token.

    The noise of a position is the same for both, so they sample the same token with a probability of at least (1 - d) /
    (1 + d) at a total variation distance d of their distributions (Daliri, Musco, Suresh, arXiv 2408.07978).
    """
    token_id: int = np.asarray(_token(logits, request)).item()
    return token_id


def _masked(logits: mx.array, request: SamplingRequest) -> mx.array:
    """Return logits (1, vocabulary) with minus infinity for the tokens that the request's mask excludes."""
    if request.token_mask is None:
        return logits
    allowed = mx.array(_allowed(request.token_mask, logits.shape[-1]))
    return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))


def _allowed(mask: TokenMask, vocab_size: int) -> NDArray[np.bool_]:
    """Return for each token whether ``mask`` allows it."""
    if mask.form is MaskForm.BITS:
        return np.unpackbits(np.frombuffer(mask.data, np.uint8), count=vocab_size, bitorder="little").view(np.bool_)
    allowed = np.full(vocab_size, mask.form is MaskForm.ALL_BUT)
    allowed[np.frombuffer(mask.data, np.uint32)] ^= True
    return allowed


def _biased(logits: mx.array, bias: LogitBias) -> mx.array:
    """Return logits (1, vocabulary) with the biases added."""
    token_ids = mx.array(np.frombuffer(bias.token_ids, np.uint32))
    return logits.at[:, token_ids].add(mx.array(np.frombuffer(bias.values, np.float32)))


def _penalized(logits: mx.array, token_ids: tuple[int, ...], penalty: float) -> mx.array:
    """Return logits (1, vocabulary), those of ``token_ids`` divided or multiplied by ``penalty`` (arXiv 1909.05858)."""
    chosen = mx.array(token_ids)[None]
    found = mx.take_along_axis(logits, chosen, axis=-1)
    return mx.put_along_axis(logits, chosen, mx.where(found < 0, found * penalty, found / penalty), axis=-1)


def _top_p(logprobs: mx.array, mass: float) -> mx.array:
    """Return logprobs (1, vocabulary) of the most likely tokens that together have ``mass``; of others -inf."""
    ascending = mx.sort(logprobs, axis=-1)
    probabilities = mx.exp(ascending)
    mass_above = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    total = mass_above[..., :1] + probabilities[..., :1]
    num_dropped = (mass_above >= mass * total).sum(axis=-1, keepdims=True)
    return mx.where(logprobs < mx.take_along_axis(ascending, num_dropped, axis=-1), -mx.inf, logprobs)


def _min_p(logprobs: mx.array, fraction: float) -> mx.array:
    """Return logprobs (1, vocabulary) of tokens with ``fraction`` of the best token's probability; of others -inf."""
    return mx.where(logprobs < logprobs.max(axis=-1, keepdims=True) + math.log(fraction), -mx.inf, logprobs)


def _top_k(logprobs: mx.array, count: int) -> mx.array:
    """Return logprobs (1, vocabulary) of the ``count`` most likely tokens; of others -inf."""
    others = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[..., count:]
    return mx.put_along_axis(logprobs, others, mx.array(-mx.inf, logprobs.dtype), axis=-1)


def _token(logits: mx.array, request: SamplingRequest) -> mx.array:
    """Return the sampled id, (1,), for logits (1, vocabulary)."""
    sampling = request.sampling
    if sampling.repetition_penalty != 1.0 and request.recent_ids:
        logits = _penalized(logits, request.recent_ids[-REPETITION_WINDOW:], sampling.repetition_penalty)
    if request.logit_bias is not None:
        logits = _biased(logits, request.logit_bias)
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if sampling.top_p < 1.0:
        logprobs = _top_p(logprobs, sampling.top_p)
    if sampling.min_p > 0.0:
        logprobs = _min_p(logprobs, sampling.min_p)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logprobs = _top_k(logprobs, sampling.top_k)
    noise = mx.random.gumbel(logprobs.shape, key=_key(sampling.seed, request.position))
    return mx.argmax(logprobs / sampling.temperature + noise, axis=-1)


def _key(seed: int, position: int) -> mx.array:
    """Return MLX's random key, (2,) uint32, for one position of one sequence."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return mx.array([int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")], dtype=mx.uint32)


def _logprobs(logits: mx.array, sampling: Sampling) -> list[mx.array]:
    """Return all log-probabilities (vocabulary,) and the ids of the top N, best first; nothing if not requested."""
    if sampling.num_logprobs is None:
        return []
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return [logprobs, mx.argsort(-logprobs, axis=-1)[: sampling.num_logprobs]]


def _sampled_token(token_id: int, found: list[mx.array]) -> SampledToken:
    if not found:
        return SampledToken(token_id, None, ())
    logprobs, top_ids = found
    values, ids = np.asarray(logprobs), np.asarray(top_ids)
    return SampledToken(token_id, float(values[token_id]), tuple(zip(ids.tolist(), values[ids].tolist(), strict=True)))
