"""Tests of answer_all: requests are read as the engine can accept them, and each answer has its request's key."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from mlx_k2.coordinator.batch_results import answer_all
from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.errors import RequestError
from mlx_k2.scheduling.request import FinishReason
from tests.coordinator.token_engine import WAIT_S, TokenEngine, request, token_engine

NUM_SLOTS = 2
NUM_REQUESTS = 11


class CountedRequests:
    """NUM_REQUESTS requests that count how many were read. The answer to ``number`` has ``number`` % 4 + 1 tokens."""

    def __init__(self, *, fail_at: int = NUM_REQUESTS) -> None:
        self.num_read = 0
        self._fail_at = fail_at

    def __iter__(self) -> Iterator[tuple[int, Submission]]:
        for number in range(NUM_REQUESTS):
            if number == self._fail_at:
                raise RequestError("no such prompt")
            self.num_read += 1
            yield number, Submission(request(number + 1, 5, 6, max_tokens=number % 4 + 1))


def execute_plans(harness: TokenEngine, is_stopped: threading.Event) -> None:
    """Execute plans on all stages until ``is_stopped`` is set."""
    while not is_stopped.is_set():
        has_executed = [harness.stages.execute(rank) for rank in range(harness.limits.num_stages)]
        if not any(has_executed):
            is_stopped.wait(0.001)


@pytest.fixture
def engine() -> Iterator[Engine]:
    is_stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool, token_engine(NUM_SLOTS) as harness:
        stages = pool.submit(execute_plans, harness, is_stopped)
        yield harness.engine
        is_stopped.set()
        stages.result(WAIT_S)


def test_requests_are_read_one_by_one_as_others_end_and_each_is_answered_under_its_key(engine: Engine) -> None:
    requests = CountedRequests()
    results = {}
    for num_answered, result in enumerate(answer_all(engine, requests), start=1):
        num_ended_before = num_answered - 1  # each makes room for one more
        assert requests.num_read <= 2 * NUM_SLOTS + num_ended_before
        assert result.summary is not None and result.error is None
        results[result.key] = (result.summary.generated_tokens, result.summary.finish_reason)
    assert results == {number: (number % 4 + 1, FinishReason.LENGTH) for number in range(NUM_REQUESTS)}


def test_closing_the_generator_reads_no_more_requests_and_later_ones_are_answered(engine: Engine) -> None:
    requests = CountedRequests()
    answers = answer_all(engine, requests)
    next(answers)
    answers.close()
    num_read = requests.num_read
    assert [result.key for result in answer_all(engine, [(7, Submission(request(9, max_tokens=1)))])] == [7]
    assert requests.num_read == num_read <= 2 * NUM_SLOTS


def test_an_error_in_reading_a_request_ends_the_batch(engine: Engine) -> None:
    with pytest.raises(RequestError, match="no such prompt"):
        list(answer_all(engine, CountedRequests(fail_at=6)))
