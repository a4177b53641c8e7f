"""Tests of the token policy of replies, over a real stage: text, stop tokens and strings, limits and summaries."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Finished, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.reply_policy import ReplyLimits, ReplyPolicy, StopScanner
from mlx_k2.errors import RequestError, RequestFailed
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.token_policy import Accepted, TokenPolicy
from mlx_k2.text.reply_parts import Content
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from tests.local_cluster import VOCAB_SIZE, Cluster, local_cluster, local_host, request, rest_of, write_model

REQUEST = request(12, 40, seed=3)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = write_model(tmp_path_factory.mktemp("model") / "tiny")
    with local_cluster(folder, [local_host()]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def tokenizer(cluster: Cluster) -> Tokenizer:
    return load_tokenizer(cluster.deployment.model.files, VOCAB_SIZE)


def answer(
    cluster: Cluster, tokenizer: Tokenizer, request: Request, limits: ReplyLimits | None = None
) -> tuple[list[Token], AnswerSummary]:
    """Return the tokens of an answer, and the summary that ends it."""
    events = list(cluster.engine.submit(request, ReplyPolicy(tokenizer, request, limits or ReplyLimits())).events())
    assert isinstance(events[-1], Finished)
    return [event for event in events if isinstance(event, Token)], events[-1].summary


def test_the_joined_text_deltas_equal_all_tokens_decoded_at_once(cluster: Cluster, tokenizer: Tokenizer) -> None:
    deltas, _ = answer(cluster, tokenizer, REQUEST)
    data = b"".join(tokenizer.token_bytes(delta.token_id) for delta in deltas)
    assert "".join(delta.text for delta in deltas) == data.decode(errors="replace")
    assert len(deltas) == 40


@pytest.mark.slow
def test_an_answer_that_ends_inside_a_character_ends_with_a_replacement_character(
    cluster: Cluster, tokenizer: Tokenizer
) -> None:
    long_answer, _ = answer(cluster, tokenizer, request(12, 400, seed=3))
    num_tokens = next(count for count, token in enumerate(long_answer, 1) if not token.text)
    tokens, _ = answer(cluster, tokenizer, request(12, num_tokens, seed=3))
    assert tokens[-1].token_id == long_answer[num_tokens - 1].token_id
    assert tokens[-1].text == "\N{REPLACEMENT CHARACTER}"


def test_a_summary_counts_tokens_and_computes_rates(cluster: Cluster, tokenizer: Tokenizer) -> None:
    deltas, summary = answer(cluster, tokenizer, REQUEST)
    assert (summary.prompt_tokens, summary.generated_tokens, summary.seed) == (12, len(deltas), 3)
    assert summary.finish_reason is FinishReason.LENGTH
    assert summary.time_to_first_token_s
    num_computed = 12 - summary.cached_tokens
    assert summary.prefill_tokens_per_s == pytest.approx(num_computed / summary.time_to_first_token_s)
    assert summary.decode_tokens_per_s is not None


def test_an_answer_that_times_out_before_its_first_token_has_a_summary(cluster: Cluster, tokenizer: Tokenizer) -> None:
    deltas, summary = answer(cluster, tokenizer, replace(request(150, 40), timeout_s=1e-6))
    assert (deltas, summary.generated_tokens, summary.finish_reason) == ([], 0, FinishReason.TIMEOUT)
    assert summary.time_to_first_token_s is None and summary.prefill_tokens_per_s is None


def test_an_answer_of_one_token_has_no_decode_rate(cluster: Cluster, tokenizer: Tokenizer) -> None:
    _, summary = answer(cluster, tokenizer, request(12, 1))
    assert summary.decode_tokens_per_s is None


def test_a_stop_token_ends_the_answer_and_has_no_text(cluster: Cluster, tokenizer: Tokenizer) -> None:
    undisturbed, _ = answer(cluster, tokenizer, REQUEST)
    stop_id = undisturbed[-1].token_id
    first = [delta.token_id for delta in undisturbed].index(stop_id)
    deltas, summary = answer(cluster, tokenizer, replace(REQUEST, stop_ids=frozenset({stop_id})))
    assert [delta.token_id for delta in deltas] == [delta.token_id for delta in undisturbed[: first + 1]]
    assert tokenizer.token_bytes(stop_id).decode(errors="replace") not in deltas[-1].text
    assert summary.finish_reason is FinishReason.STOP


def test_logprobs_are_returned_on_request_and_do_not_change_tokens(cluster: Cluster, tokenizer: Tokenizer) -> None:
    plain, _ = answer(cluster, tokenizer, REQUEST)
    deltas, _ = answer(cluster, tokenizer, replace(REQUEST, sampling=Sampling(seed=3, num_logprobs=4)))
    assert [delta.token_id for delta in deltas] == [delta.token_id for delta in plain]
    assert all(delta.logprob is None and delta.top == () for delta in plain)
    for delta in deltas:
        values = [logprob for _, logprob in delta.top]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert delta.logprob is not None and delta.logprob <= values[0] <= 0


def text_of(tokens: list[Token]) -> str:
    """Return the content of an answer."""
    return "".join(part.text for token in tokens for part in token.parts if isinstance(part, Content))


def test_a_stop_string_ends_the_answer_before_it_and_is_never_part_of_the_content(
    cluster: Cluster, tokenizer: Tokenizer
) -> None:
    undisturbed, _ = answer(cluster, tokenizer, REQUEST)
    content = text_of(undisturbed)
    stop = content[20:26]
    tokens, summary = answer(cluster, tokenizer, REQUEST, ReplyLimits(stop_strings=(stop, "not in the text")))
    assert text_of(tokens) == content[: content.index(stop)]
    assert summary.finish_reason is FinishReason.STOP
    assert [token.token_id for token in tokens] == [token.token_id for token in undisturbed[: len(tokens)]]


def test_no_stop_token_is_sampled_before_min_tokens(cluster: Cluster, tokenizer: Tokenizer) -> None:
    undisturbed, _ = answer(cluster, tokenizer, REQUEST)
    stopping = replace(REQUEST, stop_ids=frozenset({undisturbed[2].token_id, undisturbed[20].token_id}))
    short, _ = answer(cluster, tokenizer, stopping)
    assert len(short) == 3
    longer, summary = answer(cluster, tokenizer, stopping, ReplyLimits(min_tokens=10))
    assert len(longer) >= 10
    assert not {token.token_id for token in longer[:9]} & stopping.stop_ids
    assert [token.token_id for token in longer[:2]] == [token.token_id for token in undisturbed[:2]]
    assert summary.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="a stop string is empty"):
        ReplyLimits(stop_strings=("",))


class FailingPolicy(TokenPolicy):
    """A policy that raises an error at its third token."""

    def __init__(self) -> None:
        self._num_tokens = 0

    def accept(self, token_id: int) -> Accepted:
        self._num_tokens += 1
        if self._num_tokens == 3:
            raise ValueError("a defect")
        return super().accept(token_id)


def test_an_exception_in_a_policy_ends_only_its_own_request(cluster: Cluster) -> None:
    alone = cluster.tokens(REQUEST)[REQUEST]
    with_failing_policy = Submission(request(9, 30), FailingPolicy())
    failing, other = cluster.engine.submit_all([with_failing_policy, Submission(REQUEST)])
    with pytest.raises(RequestFailed, match="its token policy failed: ValueError: a defect"):
        list(failing.events())
    assert rest_of(other)[0] == alone


@settings(max_examples=500)
@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40), max_size=10),
)
def test_stop_strings_are_found_however_the_text_is_divided(text: str, stops: list[str], cuts: list[int]) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *ends])]
    by_pieces, by_letters = StopScanner(stops), StopScanner(stops)
    text_by_pieces = "".join(by_pieces.add(piece) for piece in pieces if by_pieces.found is None)
    text_by_letters = "".join(by_letters.add(letter) for letter in text if by_letters.found is None)
    assert text_by_pieces + by_pieces.flush() == text_by_letters + by_letters.flush()
    assert by_pieces.found == by_letters.found
    if by_letters.found is None:
        assert not [stop for stop in stops if stop in text]
    else:
        end = min(text.index(stop) + len(stop) for stop in stops if stop in text)
        assert text[:end].endswith(by_letters.found)


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.integers(0, 20))
def test_a_raw_text_ends_before_its_first_stop_string(
    tokenizer: Tokenizer, text: str, stop_strings: list[str], at: int
) -> None:
    text = text[:at] + "".join(stop_strings[:1]) + text[at:]
    policy = ReplyPolicy(tokenizer, REQUEST, ReplyLimits(tuple(stop_strings)), is_raw=True)
    content, reason = "", None
    for token_id in tokenizer.encode_text(text):
        accepted = policy.accept(token_id)
        content += "".join(part.text for part in accepted.parts if isinstance(part, Content))
        reason = accepted.finish_reason
        if reason is not None:
            break
    content += "".join(part.text for part in policy.finish().parts if isinstance(part, Content))
    has_stop_string = any(stop in text for stop in stop_strings)
    assert (reason is FinishReason.STOP) == has_stop_string
    assert text.startswith(content)
    assert not any(stop in content for stop in stop_strings)
    assert has_stop_string or content == text
