"""The draft head on the last stage: it computes after a step's tokens were sent. Knows no pipes."""

import time
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlx_k2.model.batch import Batch
from mlx_k2.model.draft_model import DraftModel
from mlx_k2.model.sampler import SamplingRequest, sample_draft
from mlx_k2.protocol.messages import Drafted, Step
from mlx_k2.sampling import REPETITION_WINDOW, LogitBias, SampledToken
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.stage.draft_plans import DraftPlans

_TAIL_TOKENS = 8
"""Number of a slot's last positions whose features are kept, for plans that go back to one of these positions."""


class _Tail(NamedTuple):
    """The features (tokens, hidden) of a slot's last positions, those just before position ``end``."""

    end: int
    features: mx.array

    def until(self, end: int) -> "_Tail | None":
        """Return the tail that ends at position ``end``; None if the features of position ``end`` - 1 are not kept."""
        num_tokens = self.features.shape[0] - (self.end - end)
        return _Tail(end, self.features[:num_tokens]) if 0 < num_tokens <= self.features.shape[0] else None


@dataclass(frozen=True)
class FinishedStep:
    """A step whose tokens were sampled. ``features`` (tokens, hidden) are the draft head's inputs for its positions."""

    step: Step
    batch: Batch
    features: mx.array
    tokens: tuple[SampledToken, ...]


class Drafting:
    """A draft head, its cache, and the features that its next cache rows need."""

    def __init__(self, model: DraftModel, hidden_size: int, context_tokens: int, plans: DraftPlans) -> None:
        self._model = model
        self._no_features = mx.zeros((1, hidden_size), model.cache.dtype)  # in place of features that are not kept
        self._context_tokens = context_tokens
        self._plans = plans
        self._tails: dict[int, _Tail | None] = {}  # by slot

    def copy_positions(self, source: int, target: int, count: int) -> None:
        """Copy the first ``count`` cached positions of slot ``source`` to slot ``target``."""
        self._model.cache.copy(source, target, count)
        tail = self._tails.get(source)
        self._tails[target] = None if tail is None else tail.until(count)

    def finish(self, finished: FinishedStep) -> Drafted | None:
        """Write the cache rows of a step's tokens. Return the drafts after the row that requests some, if one does."""
        start_s = time.perf_counter()
        self._write_rows(finished)
        tokens = iter(finished.tokens)
        num_tokens = 0
        drafted = None
        for row in finished.step.rows:
            num_tokens += len(row.token_ids)
            token = next(tokens) if row.needs_logits else None
            if row.draft is not None and token is not None:
                drafts = self._drafts(row, token.token_id, finished.features[num_tokens - 1 : num_tokens])
                drafted = Drafted(finished.step.number, tuple(drafts), time.perf_counter() - start_s)
                break
        # also after planned drafts, which compute nothing: otherwise the rows of many steps would wait for one of them
        mx.async_eval(self._model.cache.arrays, [tail for tail in self._tails.values() if tail is not None])
        return drafted

    def _write_rows(self, finished: FinishedStep) -> None:
        """Write the cache row of each token from the features of the position before it, or from zeros.

        Zeros are used at position 0, whose row is never read, and if the tail before the span's position is not kept.
        """
        features_before: list[mx.array] = []
        start = 0
        for span in finished.batch.spans:
            tail = self._tails.get(span.slot)
            tail = None if tail is None else tail.until(span.position)
            features = finished.features[start : start + span.count]
            features_before.append(self._no_features if tail is None else tail.features[-1:])
            if span.count > 1:
                features_before.append(features[:-1])
            joined = features if tail is None else mx.concatenate([tail.features, features])
            last = mx.arange(max(0, joined.shape[0] - _TAIL_TOKENS), joined.shape[0])
            self._tails[span.slot] = _Tail(span.end, joined[last])  # a copy: a view would keep all features in memory
            start += span.count
        token_ids = mx.array([token_id for row in finished.step.rows for token_id in row.token_ids])
        self._model.write_rows(token_ids, mx.concatenate(features_before), finished.batch)

    def _drafts(self, row: Row, token_id: int, features: mx.array) -> list[int]:
        """Return the drafts after ``token_id``, which was sampled at the end of ``row``: planned ones, then new ones.

        Planned drafts are not replaced, because the stages compute them already.
        """
        assert row.draft is not None, "the row requests drafts"
        num_drafts = max(0, min(row.draft.num_tokens, self._context_tokens - row.end - 1))
        planned = self._plans.drafts_after(row.slot, row.end, token_id)[:num_drafts]
        if len(planned) == num_drafts:
            return planned
        token_ids = [token_id]
        for index in range(num_drafts):
            output = self._model.run(token_ids[-1], features, row.slot, position=row.end + index)
            features = output.features
            if index < len(planned):
                token_ids.append(planned[index])
            else:
                token_ids.append(sample_draft(self._model.logits(output), _sampling_request(row, token_ids)))
        return token_ids[1:]


def _sampling_request(row: Row, token_ids: list[int]) -> SamplingRequest:
    """Return the request for the token after ``token_ids``, which follow the row's tokens."""
    assert row.sampling is not None, "the row samples"
    recent_ids = (*row.recent_ids, *token_ids)[-REPETITION_WINDOW:]
    bias = _bias_with_penalties(row, token_ids)
    return SamplingRequest(row.sampling, row.end + len(token_ids), recent_ids, logit_bias=bias)


def _bias_with_penalties(row: Row, token_ids: list[int]) -> LogitBias | None:
    """Return the row's logit bias with the penalties of ``token_ids``.

    If a token has a bias, this bias is taken to hold its presence penalty already. That is wrong for a token that has
    a bias of the request only, but then a draft may be wrong, and no token is.
    """
    draft = row.draft
    if draft is None or not (draft.presence_penalty or draft.frequency_penalty):
        return row.logit_bias
    biases = {} if row.logit_bias is None else row.logit_bias.by_token()
    for token_id in token_ids:
        penalty = draft.frequency_penalty + (0.0 if token_id in biases else draft.presence_penalty)
        biases[token_id] = biases.get(token_id, 0.0) - penalty
    return LogitBias.of(biases)
