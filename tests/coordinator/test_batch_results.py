"""Tests of complete answers to many requests: each request is read when there is room for it, and keeps its key."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_k2.coordinator.batch_results import answer_all
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.errors import RequestError
from mlx_k2.scheduling.request import FinishReason
from tests.coordinator.token_engine import WAIT_S, TokenEngine, request, token_engine

NUM_SLOTS = 2
NUM_REQUESTS = 11


class CountedRequests:
    """Keys and requests that count how many of them were read. Request ``number`` has ``number`` % 4 + 1 tokens."""

    def __init__(self, *, fail_at: int = NUM_REQUESTS) -> None:
        self.num_read = 0
        self._fail_at = fail_at

    def __iter__(self) -> Iterator[tuple[int, Submission]]:
        for number in range(NUM_REQUESTS):
            if number == self._fail_at:
                raise RequestError("no such prompt")
            self.num_read += 1
            yield number, Submission(request(number + 1, 5, 6, max_tokens=number % 4 + 1))


def execute_plans(engine: TokenEngine, is_over: threading.Event) -> None:
    """Execute plans until ``is_over``."""
    while not is_over.is_set():
        executed = [engine.stages.execute(rank) for rank in range(engine.limits.num_stages)]
        if not any(executed):
            is_over.wait(0.001)


@pytest.fixture
def engine() -> Iterator[TokenEngine]:
    is_over = threading.Event()
    with ThreadPoolExecutor(1) as pool, token_engine(NUM_SLOTS) as engine:
        running = pool.submit(execute_plans, engine, is_over)
        yield engine
        is_over.set()
        running.result(WAIT_S)


def test_requests_are_read_one_by_one_as_others_end_and_each_is_answered_under_its_key(engine: TokenEngine) -> None:
    requests = CountedRequests()
    results = {}
    for num_answered, result in enumerate(answer_all(engine.engine, requests), start=1):
        assert requests.num_read <= 2 * NUM_SLOTS + num_answered - 1
        assert result.summary is not None and result.error is None
        results[result.key] = (result.summary.generated_tokens, result.summary.finish_reason)
    assert results == {number: (number % 4 + 1, FinishReason.LENGTH) for number in range(NUM_REQUESTS)}


def test_closing_the_generator_reads_no_more_requests_and_cancels_those_that_run(engine: TokenEngine) -> None:
    requests = CountedRequests()
    answers = answer_all(engine.engine, requests)
    next(answers)
    answers.close()
    num_read = requests.num_read
    assert [result.key for result in answer_all(engine.engine, [(7, Submission(request(9, max_tokens=1)))])] == [7]
    assert requests.num_read == num_read <= 2 * NUM_SLOTS


def test_an_error_in_reading_a_request_ends_the_batch(engine: TokenEngine) -> None:
    with pytest.raises(RequestError, match="no such prompt"):
        list(answer_all(engine.engine, CountedRequests(fail_at=6)))
