"""Tests of ReplyPolicy over a real stage: text, stop tokens, stop strings, summaries and log-probabilities."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Finished, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.reply_policy import NO_LIMITS, ReplyLimits, ReplyPolicy, StopScanner
from mlx_k2.errors import RequestError, RequestFailed
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.scheduling.token_policy import Accepted, TokenPolicy
from mlx_k2.text.reply_parts import Content, Part
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
    cluster: Cluster, tokenizer: Tokenizer, request: Request, limits: ReplyLimits = NO_LIMITS
) -> tuple[list[Token], AnswerSummary]:
    """Run a request; return the tokens of its answer and the summary at its end."""
    events = list(cluster.engine.submit(request, ReplyPolicy(tokenizer, request, limits)).events())
    assert isinstance(events[-1], Finished)
    return [event for event in events if isinstance(event, Token)], events[-1].summary


def test_the_joined_texts_of_tokens_equal_all_tokens_decoded_at_once(cluster: Cluster, tokenizer: Tokenizer) -> None:
    tokens, _ = answer(cluster, tokenizer, REQUEST)
    data = b"".join(tokenizer.token_bytes(token.token_id) for token in tokens)
    assert "".join(token.text for token in tokens) == data.decode(errors="replace")
    assert len(tokens) == REQUEST.max_tokens


@pytest.mark.slow
def test_an_answer_that_ends_inside_a_character_ends_with_a_replacement_character(
    cluster: Cluster, tokenizer: Tokenizer
) -> None:
    long_answer, _ = answer(cluster, tokenizer, request(12, 400, seed=3))
    num_tokens = next(count for count, token in enumerate(long_answer, 1) if not token.text)  # ends inside a character
    tokens, _ = answer(cluster, tokenizer, request(12, num_tokens, seed=3))
    assert tokens[-1].token_id == long_answer[num_tokens - 1].token_id
    assert tokens[-1].text == "\N{REPLACEMENT CHARACTER}"


def test_a_summary_counts_tokens_and_computes_rates(cluster: Cluster, tokenizer: Tokenizer) -> None:
    tokens, summary = answer(cluster, tokenizer, REQUEST)
    num_prompt = len(REQUEST.prompt_ids)
    assert (summary.prompt_tokens, summary.generated_tokens) == (num_prompt, len(tokens))
    assert summary.seed == REQUEST.sampling.seed
    assert summary.finish_reason is FinishReason.LENGTH
    assert summary.time_to_first_token_s
    num_computed = num_prompt - summary.cached_tokens
    assert summary.prefill_tokens_per_s == pytest.approx(num_computed / summary.time_to_first_token_s)
    assert summary.decode_tokens_per_s is not None


def test_an_answer_that_times_out_before_its_first_token_has_a_summary(cluster: Cluster, tokenizer: Tokenizer) -> None:
    tokens, summary = answer(cluster, tokenizer, replace(request(150, 40), timeout_s=1e-6))
    assert (tokens, summary.generated_tokens, summary.finish_reason) == ([], 0, FinishReason.TIMEOUT)
    assert summary.time_to_first_token_s is None and summary.prefill_tokens_per_s is None


def test_an_answer_of_one_token_has_no_decode_rate(cluster: Cluster, tokenizer: Tokenizer) -> None:
    _, summary = answer(cluster, tokenizer, request(12, 1))
    assert summary.decode_tokens_per_s is None


def test_a_stop_token_ends_the_answer_and_has_no_text(cluster: Cluster, tokenizer: Tokenizer) -> None:
    undisturbed, _ = answer(cluster, tokenizer, REQUEST)
    stop_id = undisturbed[-1].token_id
    num_to_stop = ids_of(undisturbed).index(stop_id) + 1
    tokens, summary = answer(cluster, tokenizer, replace(REQUEST, stop_ids=frozenset({stop_id})))
    assert ids_of(tokens) == ids_of(undisturbed)[:num_to_stop]
    assert tokenizer.token_bytes(stop_id).decode(errors="replace") not in tokens[-1].text
    assert summary.finish_reason is FinishReason.STOP


def test_logprobs_are_returned_on_request_and_do_not_change_tokens(cluster: Cluster, tokenizer: Tokenizer) -> None:
    plain, _ = answer(cluster, tokenizer, REQUEST)
    tokens, _ = answer(cluster, tokenizer, replace(REQUEST, sampling=Sampling(seed=3, num_logprobs=4)))
    assert ids_of(tokens) == ids_of(plain)
    assert all(token.logprob is None and token.top == () for token in plain)
    for token in tokens:
        top_logprobs = [logprob for _, logprob in token.top]
        assert len(top_logprobs) == 4
        assert top_logprobs == sorted(top_logprobs, reverse=True)
        assert token.logprob is not None and token.logprob <= top_logprobs[0] <= 0


def ids_of(tokens: Sequence[Token]) -> list[int]:
    return [token.token_id for token in tokens]


def content_of(parts: Iterable[Part]) -> str:
    """Return the text of the parts that are content."""
    return "".join(part.text for part in parts if isinstance(part, Content))


def test_a_stop_string_ends_the_answer_before_it_and_is_never_part_of_the_content(
    cluster: Cluster, tokenizer: Tokenizer
) -> None:
    undisturbed, _ = answer(cluster, tokenizer, REQUEST)
    content = content_of(itertools.chain(*(token.parts for token in undisturbed)))
    stop_string = content[20:26]
    tokens, summary = answer(cluster, tokenizer, REQUEST, ReplyLimits(stop_strings=(stop_string, "not in the text")))
    assert content_of(itertools.chain(*(token.parts for token in tokens))) == content[: content.index(stop_string)]
    assert summary.finish_reason is FinishReason.STOP
    assert ids_of(tokens) == ids_of(undisturbed)[: len(tokens)]


def test_no_stop_token_is_sampled_before_min_tokens(cluster: Cluster, tokenizer: Tokenizer) -> None:
    undisturbed, _ = answer(cluster, tokenizer, REQUEST)
    stopping = replace(REQUEST, stop_ids=frozenset({undisturbed[2].token_id, undisturbed[20].token_id}))
    short, _ = answer(cluster, tokenizer, stopping)
    assert len(short) == 3
    longer, summary = answer(cluster, tokenizer, stopping, ReplyLimits(min_tokens=10))
    assert len(longer) >= 10
    assert not set(ids_of(longer)[:9]) & stopping.stop_ids
    assert ids_of(longer)[:2] == ids_of(undisturbed)[:2]
    assert summary.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="a stop string is empty"):
        ReplyLimits(stop_strings=("",))


class FailingPolicy(TokenPolicy):
    """A token policy that raises an error at its third token."""

    def __init__(self) -> None:
        self._num_tokens = 0

    def accept(self, token_id: int) -> Accepted:
        self._num_tokens += 1
        if self._num_tokens == 3:
            raise ValueError("a defect")
        return super().accept(token_id)


def test_an_exception_in_a_policy_ends_only_its_own_request(cluster: Cluster) -> None:
    tokens_alone = cluster.tokens(REQUEST)[REQUEST]
    failing, other = cluster.engine.submit_all([Submission(request(9, 30), FailingPolicy()), Submission(REQUEST)])
    with pytest.raises(RequestFailed, match="its token policy failed: ValueError: a defect"):
        list(failing.events())
    assert rest_of(other)[0] == tokens_alone


@settings(max_examples=500)
@given(
    st.text("abc", max_size=40),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.sets(st.integers(0, 40), max_size=10),
)
def test_stop_strings_are_found_however_the_text_is_divided(text: str, stops: list[str], cuts: set[int]) -> None:
    """The first stop string to end is found, in pieces that end at ``cuts`` as in single letters."""
    pieces = [text[start:end] for start, end in itertools.pairwise([0, *sorted(cuts), len(text)])]
    by_piece, by_letter = StopScanner(stops), StopScanner(stops)
    piece_output = "".join(by_piece.add(piece) for piece in pieces if by_piece.found is None)
    letter_output = "".join(by_letter.add(letter) for letter in text if by_letter.found is None)
    assert (piece_output + by_piece.flush(), by_piece.found) == (letter_output + by_letter.flush(), by_letter.found)
    if by_letter.found is None:
        assert not any(stop in text for stop in stops)
    else:
        first_end = min(text.index(stop) + len(stop) for stop in stops if stop in text)
        assert text[:first_end].endswith(by_letter.found)


@given(st.text(max_size=20), st.lists(st.text(min_size=1, max_size=3), max_size=3), st.integers(0, 20))
def test_a_raw_text_ends_before_its_first_stop_string(
    tokenizer: Tokenizer, text: str, stop_strings: list[str], stop_at: int
) -> None:
    text = text[:stop_at] + "".join(stop_strings[:1]) + text[stop_at:]
    policy = ReplyPolicy(tokenizer, REQUEST, ReplyLimits(tuple(stop_strings)), is_raw=True)
    parts: list[Part] = []
    reason = None
    for token_id in tokenizer.encode_text(text):
        accepted = policy.accept(token_id)
        parts += accepted.parts
        reason = accepted.finish_reason
        if reason is not None:
            break
    output = content_of([*parts, *policy.finish().parts])
    has_stop = any(stop in text for stop in stop_strings)
    assert (reason is FinishReason.STOP) == has_stop
    assert text.startswith(output)
    assert not any(stop in output for stop in stop_strings)
    assert has_stop or output == text
