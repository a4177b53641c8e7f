"""Sampling of one token from each row of logits. Knows no sequences: each row has a request with its parameters.

Order: the repetition penalty and then the logit bias on the logits (mlx-lm adds the bias first); top-p, min-p and top-k
on the log-probabilities, and then the temperature, as in mlx-lm. The token with the largest sum of log-probability and
Gumbel noise is sampled. The noise's random key is derived from (seed, position) only: so a token does not depend on the
other rows of its step, and a draft head with the same noise often samples the same token (docs/design/0121).
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
    """The parameters of one row. ``position`` is that of the token to sample; ``recent_ids`` are the tokens before it.

    ``token_mask`` None: every token is allowed.
    """

    sampling: Sampling
    position: int
    recent_ids: tuple[int, ...]
    token_mask: TokenMask | None = None
    logit_bias: LogitBias | None = None


def sample_tokens(logits: mx.array, requests: Sequence[SamplingRequest]) -> list[SampledToken]:
    """Sample one token from each row of logits (rows, vocabulary) float32, by the request of the row."""
    if any(request.token_mask is not None for request in requests):
        logits = mx.concatenate([_masked(logits[row : row + 1], request) for row, request in enumerate(requests)])
    tokens = mx.concatenate([_sample(logits[row : row + 1], request) for row, request in enumerate(requests)])
    logprobs = [_logprobs(logits[row], request.sampling) for row, request in enumerate(requests)]
    mx.eval(tokens, logprobs)
    token_ids: list[int] = np.asarray(tokens).tolist()
    return [_sampled_token(*pair) for pair in zip(token_ids, logprobs, strict=True)]


def sample_draft(logits: mx.array, request: SamplingRequest) -> int:
    """Sample a token from a draft head's logits (1, vocabulary), with the filters and the noise of the target's token.

    Because the noise is the same, head and target sample the same token with a probability of at least (1 - d) /
    (1 + d), where d is the total variation distance of their distributions (Daliri, Musco, Suresh, arXiv 2408.07978).
    """
    token_id: int = np.asarray(_sample(logits, request)).item()
    return token_id


def _masked(logits: mx.array, request: SamplingRequest) -> mx.array:
    """Return logits (1, vocabulary) with minus infinity for the tokens that the request's mask excludes."""
    if request.token_mask is None:
        return logits
    allowed = mx.array(_allowed(request.token_mask, logits.shape[-1]))
    return mx.where(allowed, logits, mx.array(-mx.inf, logits.dtype))


def _allowed(mask: TokenMask, vocab_size: int) -> NDArray[np.bool_]:
    """Return whether ``mask`` allows each token: (vocabulary,)."""
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
    """Return logits (1, vocabulary) with the repetition penalty of ``token_ids`` (CTRL, arXiv 1909.05858)."""
    indices = mx.array(token_ids)[None]
    old = mx.take_along_axis(logits, indices, axis=-1)
    return mx.put_along_axis(logits, indices, mx.where(old < 0, old * penalty, old / penalty), axis=-1)


def _top_p(logprobs: mx.array, mass: float) -> mx.array:
    """Return logprobs (1, vocabulary) with -inf for all but the most likely tokens, which together have ``mass``."""
    ascending = mx.sort(logprobs, axis=-1)
    probabilities = mx.exp(ascending)
    mass_above = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    total = mass_above[..., :1] + probabilities[..., :1]
    num_dropped = (mass_above >= mass * total).sum(axis=-1, keepdims=True)
    return mx.where(logprobs < mx.take_along_axis(ascending, num_dropped, axis=-1), -mx.inf, logprobs)


def _min_p(logprobs: mx.array, fraction: float) -> mx.array:
    """Return logprobs (1, vocabulary) with -inf for tokens below ``fraction`` of the best token's probability."""
    return mx.where(logprobs < logprobs.max(axis=-1, keepdims=True) + math.log(fraction), -mx.inf, logprobs)


def _top_k(logprobs: mx.array, count: int) -> mx.array:
    """Return logprobs (1, vocabulary) with -inf for all but the ``count`` most likely tokens."""
    others = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[..., count:]
    return mx.put_along_axis(logprobs, others, mx.array(-mx.inf, logprobs.dtype), axis=-1)


def _sample(logits: mx.array, request: SamplingRequest) -> mx.array:
    """Return the id (1,) of the token sampled from logits (1, vocabulary), lazily. Masks are applied before."""
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
    """Return MLX's random key, (2,) uint32, for one position and seed."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return mx.array([int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")], dtype=mx.uint32)


def _logprobs(logits: mx.array, sampling: Sampling) -> list[mx.array]:
    """Return all log-probabilities (vocabulary,) and the ids of the best ones; no arrays if none are requested.

    They are computed from the masked logits, without penalties, bias, filters and temperature.
    """
    if sampling.num_logprobs is None:
        return []
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return [logprobs, mx.argsort(-logprobs, axis=-1)[: sampling.num_logprobs]]


def _sampled_token(token_id: int, logprobs_and_top_ids: list[mx.array]) -> SampledToken:
    if not logprobs_and_top_ids:
        return SampledToken(token_id, None, ())
    logprobs, top_ids = (np.asarray(array) for array in logprobs_and_top_ids)
    top = zip(top_ids.tolist(), logprobs[top_ids].tolist(), strict=True)
    return SampledToken(token_id, float(logprobs[token_id]), tuple(top))
