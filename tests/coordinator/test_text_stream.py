"""Tests of turning tokens into text, over a real stage."""

from collections.abc import Iterator
from dataclasses import replace

import pytest

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.text_stream import Delta, StageReplies
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from tests.local_cluster import VOCAB_SIZE, Cluster, local_cluster, local_host, request, write_model

ASKED = request(12, 40, seed=3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = write_model(tmp_path_factory.mktemp("model") / "tiny")
    with local_cluster(folder, [local_host()]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def tokenizer(cluster: Cluster) -> Tokenizer:
    return load_tokenizer(cluster.deployment.model.files, VOCAB_SIZE)


def answer(cluster: Cluster, tokenizer: Tokenizer, asked: Request) -> tuple[list[Delta], AnswerSummary]:
    """Return the deltas of an answer, and the summary that ends it."""
    *deltas, summary = StageReplies(cluster.coordinator, tokenizer).stream(asked)
    assert isinstance(summary, AnswerSummary)
    assert all(isinstance(delta, Delta) for delta in deltas)
    return [delta for delta in deltas if isinstance(delta, Delta)], summary


def test_the_joined_text_deltas_equal_all_tokens_decoded_at_once(cluster: Cluster, tokenizer: Tokenizer) -> None:
    deltas, _ = answer(cluster, tokenizer, ASKED)
    data = b"".join(tokenizer.token_bytes(delta.token_id) for delta in deltas)
    assert "".join(delta.text for delta in deltas) == data.decode(errors="replace")
    assert len(deltas) == 40


def test_an_answer_that_ends_inside_a_character_ends_with_a_replacement_character(
    cluster: Cluster, tokenizer: Tokenizer
) -> None:
    whole, _ = answer(cluster, tokenizer, request(12, 400, seed=3))
    pending = next(count for count, delta in enumerate(whole, 1) if not delta.text)
    deltas, _ = answer(cluster, tokenizer, request(12, pending, seed=3))
    assert deltas[-1].token_id == whole[pending - 1].token_id
    assert deltas[-1].text == "\N{REPLACEMENT CHARACTER}"


def test_a_summary_counts_tokens_and_computes_rates(cluster: Cluster, tokenizer: Tokenizer) -> None:
    deltas, summary = answer(cluster, tokenizer, ASKED)
    assert (summary.prompt_tokens, summary.generated_tokens, summary.seed) == (12, len(deltas), 3)
    assert summary.finish_reason is FinishReason.LENGTH
    assert summary.time_to_first_token_s
    computed = 12 - summary.cached_tokens
    assert summary.prefill_tokens_per_s == pytest.approx(computed / summary.time_to_first_token_s)
    assert summary.decode_tokens_per_s is not None


def test_an_answer_that_times_out_before_its_first_token_has_a_summary(cluster: Cluster, tokenizer: Tokenizer) -> None:
    deltas, summary = answer(cluster, tokenizer, replace(request(150, 40), timeout_s=1e-6))
    assert (deltas, summary.generated_tokens, summary.finish_reason) == ([], 0, FinishReason.TIMEOUT)
    assert summary.time_to_first_token_s is None and summary.prefill_tokens_per_s is None


def test_an_answer_of_one_token_has_no_decode_rate(cluster: Cluster, tokenizer: Tokenizer) -> None:
    _, summary = answer(cluster, tokenizer, request(12, 1))
    assert summary.decode_tokens_per_s is None


def test_a_stop_token_ends_the_answer_and_has_no_text(cluster: Cluster, tokenizer: Tokenizer) -> None:
    undisturbed, _ = answer(cluster, tokenizer, ASKED)
    stop_id = undisturbed[-1].token_id
    first = [delta.token_id for delta in undisturbed].index(stop_id)
    deltas, summary = answer(cluster, tokenizer, replace(ASKED, stop_ids=frozenset({stop_id})))
    assert [delta.token_id for delta in deltas] == [delta.token_id for delta in undisturbed[: first + 1]]
    assert tokenizer.token_bytes(stop_id).decode(errors="replace") not in deltas[-1].text
    assert summary.finish_reason is FinishReason.STOP


def test_logprobs_are_returned_on_request_and_do_not_change_tokens(cluster: Cluster, tokenizer: Tokenizer) -> None:
    plain, _ = answer(cluster, tokenizer, ASKED)
    asked = replace(ASKED, sampling=Sampling(seed=3, num_logprobs=4))
    deltas, _ = answer(cluster, tokenizer, asked)
    assert [delta.token_id for delta in deltas] == [delta.token_id for delta in plain]
    assert all(delta.logprob is None and delta.top == () for delta in plain)
    for delta in deltas:
        values = [logprob for _, logprob in delta.top]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert delta.logprob is not None and delta.logprob <= values[0] <= 0


def test_closing_an_answer_cancels_it_and_does_not_change_the_next_one(cluster: Cluster, tokenizer: Tokenizer) -> None:
    undisturbed, _ = answer(cluster, tokenizer, ASKED)
    stream = StageReplies(cluster.coordinator, tokenizer).stream(request(30, 1000))
    next(stream)
    stream.close()
    again, _ = answer(cluster, tokenizer, ASKED)
    assert again == undisturbed
