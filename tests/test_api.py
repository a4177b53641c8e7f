"""Tests of the Python API on real stages of this machine, and of how it is imported."""

import asyncio
import itertools
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import mlx_k2
from mlx_k2 import AsyncCluster, Cluster, Completion, Content, Reasoning, Sampling
from mlx_k2.coordinator.engine import MAX_QUEUED
from mlx_k2.errors import ClusterError, HostfileError, RequestError
from tests.advice import follows_advice
from tests.local_cluster import wait_until_gone, write_model

GREEDY = Sampling(temperature=0)
SUM = "What is 17 plus 25?"
ANSWER = "17 + 25 = 42"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ROOT = Path(__file__).parents[1]
START_S = 60.0


def processes() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose answers run to max_tokens."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


def test_a_stream_yields_reasoning_and_answer_in_parts_and_then_the_whole(cluster: Cluster) -> None:
    stream = cluster.stream(SUM, GREEDY)
    parts = list(stream)
    assert len(parts) > 5
    assert "".join(part.text for part in parts if isinstance(part, Content)) == ANSWER
    reply = stream.completion()
    assert reply.reasoning == "".join(part.text for part in parts if isinstance(part, Reasoning)) != ""
    assert (reply.content, reply.finish_reason, reply.tool_calls) == (ANSWER, "stop", ())
    assert reply.usage.generated_tokens > 5
    assert reply.usage.prompt_tokens > reply.usage.cached_tokens


def test_chat_returns_what_a_stream_yields_and_depends_on_the_seed_alone(cluster: Cluster) -> None:
    sampling = Sampling(temperature=1.0, seed=4, max_tokens=20)
    first, second = (cluster.chat("Count from 1 to 20.", sampling) for _ in range(2))
    assert (first.reasoning, first.content, first.seed) == (second.reasoning, second.content, 4)
    assert (first.finish_reason, first.usage.generated_tokens) == ("length", 20)


def test_a_stop_text_ends_the_answer_before_it(cluster: Cluster) -> None:
    reply = cluster.chat(SUM, Sampling(temperature=0, stop=(" =",)))
    assert (reply.content, reply.finish_reason) == ("17 + 25", "stop")


@pytest.mark.slow
def test_many_prompts_are_answered_in_their_order(cluster: Cluster) -> None:
    replies = cluster.generate((f"What is {number} plus 25?" for number in range(1, 20)), GREEDY)
    assert [reply.content for reply in replies] == [f"{number} + 25 = {number + 25}" for number in range(1, 20)]


def test_more_prompts_than_an_engine_queues_are_answered(cluster: Cluster) -> None:
    engine = cluster._running_engine()  # its own queue is as long as an API call needs
    engine._max_queued = 3
    try:
        replies = cluster.generate(["What is 1 plus 25?"] * 40, Sampling(temperature=0, max_tokens=2))
    finally:
        engine._max_queued = MAX_QUEUED
    assert len(replies) == 40


def test_a_stream_is_closed_while_another_thread_reads_it(cluster: Cluster) -> None:
    stream = cluster.stream("Count from 1 to 20.", Sampling(max_tokens=1500, seed=1))
    next(stream)
    threading.Timer(0.1, stream.close).start()
    assert stream.completion().finish_reason in ("cancelled", "stop")


@follows_advice(
    "the cluster is open already: close it first, or make another one",
    "one prompt was given: give a list of prompts, or use chat",
    "2 answers were requested, but this call returns one: leave n out",
    "the cluster is not open: use it as a context, in a with block",
)
def test_a_cluster_opens_once_and_one_prompt_is_not_a_list(cluster: Cluster) -> None:
    before = processes()
    with pytest.raises(ClusterError, match="the cluster is open already"), cluster:
        pass
    assert processes() == before
    with pytest.raises(RequestError, match="give a list of prompts, or use chat"):
        cluster.generate("hi")
    with pytest.raises(RequestError, match="this call returns one: leave n out"):
        cluster.chat("hi", Sampling(num_answers=2))
    with pytest.raises(ClusterError, match="use it as a context, in a with block"):
        Cluster().chat("hi")


def test_a_schema_that_is_enforced_in_part_is_a_warning_in_the_log(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.chat(SUM, Sampling(max_tokens=2, json_schema={"type": "array", "uniqueItems": True}))
    assert "uniqueItems" in caplog.text


def test_a_conversation_continues_with_the_result_of_a_tool_call(cluster: Cluster) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather in Rome?"}]
    reply = cluster.chat(messages, GREEDY, tools=[WEATHER])
    (call,) = reply.tool_calls
    assert (call.id, call.name, call.error) == ("functions.get_weather:0", "get_weather", None)
    assert '"Rome"' in call.arguments
    messages += [reply.message, {"role": "tool", "tool_call_id": call.id, "content": "sunny, 24 degrees"}]
    assert "24" in cluster.chat(messages, GREEDY, tools=[WEATHER]).content
    again = cluster.chat(
        [*messages, {"role": "user", "content": "What is the weather in Oslo?"}], GREEDY, tools=[WEATHER]
    )
    assert [call.id for call in again.tool_calls] == ["functions.get_weather:1"]


def test_closing_or_dropping_a_stream_cancels_its_request_and_no_other(endless: Path) -> None:
    long = Sampling(max_tokens=1500, seed=1)
    with Cluster(model=endless, num_stages=1, num_sequences=1) as cluster:
        began = time.monotonic()
        for way, is_read in itertools.product(("close", "drop"), (True, False)):
            stream = cluster.stream("Hello", long)
            if is_read:
                next(stream)
            if way == "close":
                stream.close()
            del stream
        assert cluster.chat("Hello", Sampling(max_tokens=3, seed=1)).usage.generated_tokens == 3
        assert time.monotonic() - began < 30  # 6000 tokens of one sequence take longer


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
    ("options", "kind", "words"),
    [
        ({"num_stages": "2"}, RequestError, "num_stages: expected a whole number or null, got text"),
        ({"num_stages": 0}, RequestError, "num_stages: expected a whole number >= 1"),
        ({"dtype": "int8"}, RequestError, "dtype int8 is unknown: give bfloat16 or float32"),
        ({"dense_bits": 5}, RequestError, "dense-bits 5 is unknown: give 8 or 4"),
        ({"split": [3, 0]}, RequestError, "split"),
        ({"lease_s": float("nan")}, RequestError, "lease nan is out of range: give 2 to 3600 s"),
        ({"num_stages": 2, "hostfile": "x"}, HostfileError, "give it, or a hostfile, not both"),
        ({"revision": "main"}, RequestError, "a revision is for a repository"),
        ({"num_sequences": 0}, RequestError, "num_sequences"),
        ({"restarts": -1}, RequestError, "restarts"),
    ],
)
def test_a_wrong_option_is_refused_by_name_before_anything_starts(
    options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    before = processes()
    with pytest.raises(kind, match=words):
        Cluster(**options)
    assert processes() == before


def test_what_cannot_be_answered_is_refused_with_the_reason(cluster: Cluster) -> None:
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


def test_a_cluster_that_is_not_open_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ClusterError, match="the cluster is not open: use it as a context"):
        Cluster().chat("x")


@pytest.mark.slow
def test_a_closed_cluster_leaves_no_process_also_after_an_error_and_with_a_request_that_runs(endless: Path) -> None:
    before = processes()

    class ProgramError(Exception):
        pass

    with pytest.raises(ProgramError), Cluster(model=endless, num_stages=2) as cluster:
        stream = cluster.stream("Hello", Sampling(max_tokens=1500))
        next(stream)
        started = [process for process in processes() if process not in before]
        assert len(started) > 4
        raise ProgramError
    assert not wait_until_gone(started, 5)
    assert [process for process in processes() if process not in before] == []
    assert stream.completion().finish_reason == "cancelled"


# ---- asyncio


def run_async(work: Any) -> Any:
    return asyncio.run(asyncio.wait_for(work, START_S))


def test_an_async_cluster_streams_chats_and_answers_many(endless: Path) -> None:
    async def work() -> tuple[str, Completion, list[Completion]]:
        async with AsyncCluster(num_stages=1) as cluster:
            stream = cluster.stream(SUM, GREEDY)
            text = "".join([part.text async for part in stream if isinstance(part, Content)])
            assert (await stream.completion()).content == text
            reply = await cluster.chat("Count from 3 to 5.", GREEDY)
            return text, reply, await cluster.generate([f"What is {number} plus 2?" for number in range(6)], GREEDY)

    before = processes()
    text, reply, many = run_async(work())
    assert text == ANSWER
    assert reply.content == "3, 4, 5"
    assert [one.content for one in many] == [f"{number} + 2 = {number + 2}" for number in range(6)]
    assert [process for process in processes() if process not in before] == []


def test_cancelling_a_task_cancels_its_request_and_no_other(endless: Path) -> None:
    async def work() -> None:
        async with AsyncCluster(model=endless, num_stages=1, num_sequences=1) as cluster:
            has_begun = asyncio.Event()

            async def read_all() -> None:
                async for _ in cluster.stream("Hello", Sampling(max_tokens=1500)):
                    has_begun.set()

            task = asyncio.create_task(read_all())
            await has_begun.wait()
            waiting = asyncio.create_task(cluster.chat("Hello", Sampling(max_tokens=3)))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await waiting).usage.generated_tokens == 3
            with pytest.raises(RequestError, match="thinking cannot be turned off"):
                await cluster.generate(["x", "y"], Sampling(thinking=False))

    run_async(work())


def test_a_cancelled_start_leaves_no_process(endless: Path) -> None:
    async def work() -> None:
        starting = asyncio.create_task(AsyncCluster(model=endless, num_stages=2).__aenter__())
        while len(processes()) < len(before) + 4:  # both guards and their watchdogs run
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    before = processes()
    run_async(work())
    assert [process for process in processes() if process not in before] == []


@pytest.mark.parametrize("wait_s", [0.0, 0.1])
def test_a_start_that_is_cancelled_early_and_again_leaves_no_process_and_loads_nothing(wait_s: float) -> None:
    async def work() -> None:
        starting = asyncio.create_task(AsyncCluster(num_stages=2).__aenter__())
        for _ in range(3):
            await asyncio.sleep(wait_s)
            starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert [process for process in processes() if process not in before] == []

    before = processes()
    run_async(work())


# ---- import

NUM_IMPORTS = 20
MAX_IMPORT_S = 0.005


def cpu_s(statement: str) -> float:
    """Return the CPU time of a process that runs ``statement``, which other processes do not change."""
    process = subprocess.Popen([sys.executable, "-c", statement], cwd="/")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_an_import_costs_at_most_5_ms_and_loads_nothing() -> None:
    loaded = "import sys; before = set(sys.modules); import mlx_k2; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.split() == ["mlx_k2"]
    times = [(cpu_s("import mlx_k2"), cpu_s("pass")) for _ in range(NUM_IMPORTS)]
    with_it, without = (statistics.median(one) for one in zip(*times, strict=True))
    assert with_it - without <= MAX_IMPORT_S


def test_the_api_is_imported_without_mlx() -> None:
    statement = "import sys; from mlx_k2 import Cluster; assert 'mlx' not in sys.modules; print(Cluster.__module__)"
    run = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.returncode) == ("mlx_k2.api\n", 0), run.stderr


def test_every_exported_name_exists_and_an_unknown_one_is_an_attribute_error() -> None:
    assert all(getattr(mlx_k2, name) is not None for name in mlx_k2.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Clutser'"):
        mlx_k2.Clutser  # noqa: B018


IMPORTER = """
from mlx_k2 import AsyncCluster, Cluster, Completion, MlxK2Error, Sampling

def ask(cluster: Cluster) -> str:
    for part in cluster.stream("x", Sampling(temperature=0.6)):
        reveal_type(part.text)
    reply: Completion = cluster.chat([{"role": "user", "content": "x"}])
    reveal_type(reply.usage.prompt_tokens)
    return reply.content

async def ask_async(cluster: AsyncCluster) -> None:
    async for part in cluster.stream("x"):
        reveal_type(part)

Cluster(hostfil="x")
Sampling(temperature="hot")
"""


@pytest.mark.slow
def test_mypy_checks_an_importer(tmp_path: Path) -> None:
    (tmp_path / "importer.py").write_text(IMPORTER)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "importer.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    lines = [re.sub(r"^importer.py:\d+: ", "", line) for line in run.stdout.splitlines()]
    assert re.fullmatch(r'note: Revealed type is "(builtins\.)?str"', lines[0])
    assert re.fullmatch(r'note: Revealed type is "(builtins\.)?int"', lines[1])
    assert "Reasoning" in lines[2] and "Content" in lines[2]
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors[0].startswith('error: Unexpected keyword argument "hostfil" for "Cluster"')
    assert errors[1].startswith('error: Argument "temperature" to "SamplingOptions" has incompatible type "str"')
    assert lines[-1].startswith("Found 2 errors")


@pytest.mark.slow
def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(examples) == 5
    outputs = []
    for example in examples:
        run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stderr) == (0, ""), run.stderr
        outputs.append(run.stdout)
    assert outputs[0].endswith(ANSWER)
    assert outputs[1].splitlines()[-2:-1] == ["3, 4, 5, 6, 7"]
    assert outputs[2].splitlines() == ["3 + 25 = 28", ANSWER, "40 + 25 = 65"]
    assert outputs[3].startswith("get_weather {'city': 'Rome'}\n")
    assert outputs[4].endswith("2 + 2 = 4 3 + 3 = 6\n")
