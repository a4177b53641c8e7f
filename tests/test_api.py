"""Tests of the Python API, also of asyncio's, on real stages of this machine."""

import asyncio
import itertools
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest

from mlx_k2 import AsyncCluster, Cluster, Completion, Content, Reasoning, Sampling
from mlx_k2.errors import ClusterError, HostfileError, RequestError
from tests.advice import follows_advice
from tests.local_cluster import still_running_after, write_model
from tests.processes import started_processes

GREEDY = Sampling(temperature=0)
QUESTION = "What is 17 plus 25?"
ANSWER = "17 + 25 = 42"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASYNC_TIMEOUT_S = 60.0
T = TypeVar("T")


def processes_since(before: list[psutil.Process]) -> list[psutil.Process]:
    """Return the started processes that run now and are not in ``before``."""
    return [process for process in started_processes() if process not in before]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model without a stop token, so that its answers run to max_tokens."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_stream_yields_reasoning_and_answer_in_parts_and_then_has_the_complete_reply(cluster: Cluster) -> None:
    stream = cluster.stream(QUESTION, GREEDY)
    parts = list(stream)
    assert len(parts) > 5
    assert "".join(part.text for part in parts if isinstance(part, Content)) == ANSWER
    reply = stream.completion()
    assert reply.reasoning == "".join(part.text for part in parts if isinstance(part, Reasoning)) != ""
    assert (reply.content, reply.finish_reason, reply.tool_calls) == (ANSWER, "stop", ())
    assert reply.usage.generated_tokens > 5
    assert reply.usage.prompt_tokens > reply.usage.cached_tokens


def test_two_chats_with_the_same_seed_return_the_same_reply(cluster: Cluster) -> None:
    sampling = Sampling(temperature=1.0, seed=4, max_tokens=20)
    first, second = (cluster.chat("Count from 1 to 20.", sampling) for _ in range(2))
    assert (first.reasoning, first.content, first.seed) == (second.reasoning, second.content, 4)
    assert (first.finish_reason, first.usage.generated_tokens) == ("length", 20)


def test_a_stop_text_ends_the_answer_before_it(cluster: Cluster) -> None:
    reply = cluster.chat(QUESTION, Sampling(temperature=0, stop=(" =",)))
    assert (reply.content, reply.finish_reason) == ("17 + 25", "stop")


@pytest.mark.slow
def test_many_prompts_are_answered_in_their_order(cluster: Cluster) -> None:
    replies = cluster.generate((f"What is {number} plus 25?" for number in range(1, 20)), GREEDY)
    assert [reply.content for reply in replies] == [f"{number} + 25 = {number + 25}" for number in range(1, 20)]


def test_more_prompts_than_an_engine_queues_are_answered(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster._running_engine(), "_max_queued", 3)  # fewer than the prompts below
    replies = cluster.generate(["What is 1 plus 25?"] * 40, Sampling(temperature=0, max_tokens=2))
    assert len(replies) == 40


def test_a_stream_is_closed_while_another_thread_reads_it(cluster: Cluster) -> None:
    stream = cluster.stream("Count from 1 to 20.", Sampling(max_tokens=1500, seed=1))
    next(stream)
    threading.Timer(0.1, stream.close).start()
    assert stream.completion().finish_reason in ("cancelled", "stop")  # stop: the answer ended before 0.1 s


@follows_advice(
    "the cluster is open already: close it first, or make another one",
    "one prompt was given: give a list of prompts, or use chat",
    "prompts is of type int: give a list of prompts",
    "the prompt is empty: give some text",
    "2 answers were requested, but this call returns one: repeat the prompt in the list for generate",
    "the cluster is not open: use it as a context, in a with block",
)
def test_wrong_uses_of_a_cluster_are_refused_with_the_right_use(cluster: Cluster) -> None:
    processes = started_processes()
    with pytest.raises(ClusterError, match="the cluster is open already"), cluster:
        pass
    assert started_processes() == processes
    with pytest.raises(RequestError, match="give a list of prompts, or use chat"):
        cluster.generate("hi")
    for sampling, prompts in (({"temperature": 0}, ["hi"]), (Sampling(), 5), (Sampling(), {"role": "user"})):
        with pytest.raises(RequestError, match=r"(sampling|prompts) is of type (dict|int): give a "):
            cluster.generate(prompts, sampling)  # type: ignore[arg-type]
    for prompt, tools in ((5, ()), ({"role": "user"}, ()), (QUESTION, 5), (QUESTION, "get_weather")):
        with pytest.raises(RequestError, match=r"(prompt|tools) is of type (dict|int|str): give a "):
            cluster.chat(prompt, tools=tools)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="the prompt is empty: give some text"):
        cluster.chat(" ")
    with pytest.raises(RequestError, match="this call returns one: repeat the prompt in the list for generate"):
        cluster.chat("hi", Sampling(num_answers=2))
    with pytest.raises(ClusterError, match="use it as a context, in a with block"):
        Cluster().chat("hi")


def test_a_schema_that_is_enforced_in_part_is_a_warning(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    cluster.chat(QUESTION, Sampling(max_tokens=2, json_schema={"type": "array", "uniqueItems": True}))
    assert "uniqueItems" in caplog.text


def test_a_conversation_continues_with_the_result_of_a_tool_call(cluster: Cluster) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Rome?"}]
    reply = cluster.chat(messages, GREEDY, tools=[WEATHER])
    (call,) = reply.tool_calls
    assert (call.id, call.name, call.error) == ("functions.get_weather:0", "get_weather", None)
    assert '"Rome"' in call.arguments
    messages += [reply.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 24 degrees"}]
    assert "24" in cluster.chat(messages, GREEDY, tools=[WEATHER]).content
    messages.append({"role": "user", "content": "What is the weather in Oslo?"})
    (second_call,) = cluster.chat(messages, GREEDY, tools=[WEATHER]).tool_calls
    assert second_call.id == "functions.get_weather:1"


def test_closing_or_dropping_a_stream_cancels_its_request_and_no_other(endless_model: Path) -> None:
    with Cluster(model=endless_model, num_stages=1, num_sequences=1) as cluster:
        start_s = time.monotonic()
        for is_closed, is_read in itertools.product((True, False), (True, False)):
            stream = cluster.stream("Hello", Sampling(max_tokens=1500, seed=1))
            if is_read:
                next(stream)
            if is_closed:
                stream.close()
            del stream
        # With one slot, this request runs only when the four before it have ended.
        assert cluster.chat("Hello", Sampling(max_tokens=3, seed=1)).usage.generated_tokens == 3
        assert time.monotonic() - start_s < 30  # the four streams' 6000 tokens would take longer


WRONG_VALUES: list[dict[str, Any]] = [
    {"seed": np.int64(3)},
    {"temperature": np.float32(0.5)},
    {"temperature": "hot"},
    {"temperature": True},
    {"seed": 1.5},
    {"top_k": 10.0},
    {"max_tokens": 0},
    {"max_tokens": "5"},
    {"num_answers": 0},
    {"num_answers": 10_000},
    {"min_tokens": -1},
    {"thinking_budget": -1},
    {"thinking": "on"},
    {"regex": 5},
    {"json_schema": "{}"},
    {"stop": (3,)},
    {"stop": None},
    {"stop": ("x",) * 65},
    {"logit_bias": {"5": 1.0}},
    {"logit_bias": [(5, 1.0)]},
]


@pytest.mark.parametrize("values", WRONG_VALUES, ids=str)
def test_a_sampling_value_of_a_wrong_type_or_range_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"a sampling value has the wrong type: {next(iter(values))}"):
        Sampling(**values)


@pytest.mark.parametrize(
    ("options", "error_type", "message"),
    [
        ({"num_stages": "2"}, RequestError, "num_stages: expected a whole number or null, got text"),
        ({"num_stages": 0}, RequestError, "num_stages: expected a whole number >= 1"),
        ({"dtype": "int8"}, RequestError, "dtype int8 is unknown: give bfloat16 or float32"),
        ({"dense_bits": 5}, RequestError, "dense_bits 5 is unknown: give 8 or 4"),
        ({"split": [3, 0]}, RequestError, "split"),
        ({"lease_s": float("nan")}, RequestError, "lease nan is out of range: give 2 to 3600 s"),
        ({"num_stages": 2, "hostfile": "x"}, HostfileError, "give it, or a hostfile, not both"),
        ({"revision": "main"}, RequestError, "a revision is for a repository"),
        ({"num_sequences": 0}, RequestError, "num_sequences"),
        ({"restarts": -1}, RequestError, "restarts"),
    ],
)
def test_a_wrong_option_is_refused_by_name_before_anything_starts(
    options: dict[str, Any], error_type: type[Exception], message: str
) -> None:
    processes = started_processes()
    with pytest.raises(error_type, match=message):
        Cluster(**options)
    assert started_processes() == processes


def test_a_request_that_cannot_be_answered_is_refused_with_the_reason(cluster: Cluster) -> None:
    with pytest.raises(RequestError, match=r"temperature 11.* is out of range"):
        Sampling(temperature=11)
    with pytest.raises(RequestError, match=r"give a tuple of texts, as in \('x',\)"):
        Sampling(stop="x")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="message 1 has the role 'robot'"):
        cluster.chat([{"role": "robot", "content": "x"}])
    with pytest.raises(RequestError, match="thinking cannot be turned off"):
        cluster.generate(["x"], Sampling(thinking=False))
    with pytest.raises(RequestError, match="so there is no room for an answer"):
        cluster.stream("x" * 100_000)


@pytest.mark.slow
def test_a_closed_cluster_leaves_no_process_after_an_error_and_with_a_running_request(
    endless_model: Path,
) -> None:
    before = started_processes()

    class ProgramError(Exception):
        pass

    with pytest.raises(ProgramError), Cluster(model=endless_model, num_stages=2) as cluster:
        stream = cluster.stream("Hello", Sampling(max_tokens=1500))
        next(stream)
        of_cluster = processes_since(before)
        assert len(of_cluster) == 6  # two stages, their guards and watchdogs
        raise ProgramError
    assert still_running_after(of_cluster, 5) == []
    assert processes_since(before) == []
    assert stream.completion().finish_reason == "cancelled"


def run_async(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(coroutine, ASYNC_TIMEOUT_S))


def test_an_async_cluster_streams_chats_and_generates() -> None:
    async def answers() -> tuple[str, Completion, list[Completion]]:
        async with AsyncCluster(num_stages=1) as cluster:
            stream = cluster.stream(QUESTION, GREEDY)
            text = "".join([part.text async for part in stream if isinstance(part, Content)])
            assert (await stream.completion()).content == text
            reply = await cluster.chat("Count from 3 to 5.", GREEDY)
            return text, reply, await cluster.generate([f"What is {number} plus 2?" for number in range(6)], GREEDY)

    before = started_processes()
    text, reply, sums = run_async(answers())
    assert text == ANSWER
    assert reply.content == "3, 4, 5"
    assert [sum_reply.content for sum_reply in sums] == [f"{number} + 2 = {number + 2}" for number in range(6)]
    assert processes_since(before) == []


def test_cancelling_a_task_cancels_its_request_and_no_other(endless_model: Path) -> None:
    async def cancel_one_of_two() -> None:
        async with AsyncCluster(model=endless_model, num_stages=1, num_sequences=1) as cluster:
            is_streaming = asyncio.Event()

            async def read_all() -> None:
                async for _ in cluster.stream("Hello", Sampling(max_tokens=1500)):
                    is_streaming.set()

            streaming = asyncio.create_task(read_all())
            await is_streaming.wait()
            queued = asyncio.create_task(cluster.chat("Hello", Sampling(max_tokens=3)))
            streaming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await streaming
            assert (await queued).usage.generated_tokens == 3
            # A refusal, too, reaches the task that awaits it.
            with pytest.raises(RequestError, match="thinking cannot be turned off"):
                await cluster.generate(["x", "y"], Sampling(thinking=False))

    run_async(cancel_one_of_two())


def test_a_cancelled_start_leaves_no_process(endless_model: Path) -> None:
    async def cancel_start() -> None:
        starting = asyncio.create_task(AsyncCluster(model=endless_model, num_stages=2).__aenter__())
        while len(processes_since(before)) < 4:  # both guards and their watchdogs
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    before = started_processes()
    run_async(cancel_start())
    assert processes_since(before) == []


@pytest.mark.parametrize("wait_s", [0.0, 0.1])
def test_a_start_that_is_cancelled_early_and_again_leaves_no_process(wait_s: float) -> None:
    async def cancel_start() -> None:
        starting = asyncio.create_task(AsyncCluster(num_stages=2).__aenter__())
        for _ in range(3):
            await asyncio.sleep(wait_s)
            starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert processes_since(before) == []

    before = started_processes()
    run_async(cancel_start())
