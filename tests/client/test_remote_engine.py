"""Tests of the remote engine against a server in this process: same tokens, cancellation, forced tokens and errors."""

import dataclasses
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mlx_k2.client import remote_engine
from mlx_k2.client.remote_engine import RemoteEngine
from mlx_k2.client.server_connection import ServerAddress
from mlx_k2.coordinator.answer_summary import AnswerTimer
from mlx_k2.coordinator.handle import Event, Finished, Handle, PrefillProgress, Token
from mlx_k2.coordinator.reply_policy import ReplyLimits, ReplyPolicy
from mlx_k2.errors import EngineBusy, RequestError, RequestFailed, SetupError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Priority, Request
from mlx_k2.server.api_keys import KeyRing, add_key
from mlx_k2.server.server_state import ServerOptions
from tests.coordinator.token_engine import WAIT_S, request
from tests.server.in_process import SteppedServer, stepped_server


@pytest.fixture(scope="module")
def server() -> Iterator[SteppedServer]:
    with stepped_server(num_slots=2, chunk_tokens=8) as running, running.running_stages():
        yield running


@pytest.fixture(scope="module")
def engine(server: SteppedServer) -> RemoteEngine:
    return RemoteEngine(ServerAddress(server.url))


def tokens_of(handle: Handle) -> tuple[list[int], Finished]:
    """Return the token ids of an answer, and its last event."""
    events: list[Event] = list(handle.events())
    last = events[-1]
    assert isinstance(last, Finished)
    return [event.token_id for event in events if isinstance(event, Token)], last


def with_stop_tokens(request: Request, engine: RemoteEngine) -> Request:
    """Return the request with the stop tokens of the server's model."""
    return dataclasses.replace(request, stop_ids=engine.frontend.stop_ids)


def test_the_model_is_read_from_the_server(server: SteppedServer, engine: RemoteEngine) -> None:
    assert engine.model_name == "tokens"
    assert engine.frontend.context_tokens == 4000
    assert engine.frontend.tokenizer.encode_text("Hello")
    assert engine.frontend.template.fields


def test_a_request_has_the_tokens_and_counts_of_the_servers_own_engine(
    server: SteppedServer, engine: RemoteEngine
) -> None:
    for seed in range(3):
        submitted = with_stop_tokens(request(*range(50, 90), max_tokens=25, seed=seed), engine)
        own_tokens, _ = tokens_of(server.harness.engine.submit(submitted))
        remote_tokens, finished = tokens_of(engine.submit(submitted))
        assert remote_tokens == own_tokens
        assert finished.summary.prompt_tokens == 40
        assert finished.summary.generated_tokens == len(own_tokens)
        assert finished.summary.seed == seed
        assert finished.reason is (FinishReason.LENGTH if len(own_tokens) == 25 else FinishReason.STOP)
        assert finished.summary.cached_tokens == 39  # the server's own engine has computed this prompt before


def test_every_sampling_parameter_reaches_the_servers_engine() -> None:
    sampling = Sampling(
        seed=7,
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias=((3, 1.5), (4, -2.0)),
    )
    with stepped_server() as server:
        submitted = Request((60, 61), max_tokens=50, sampling=sampling, stop_ids=frozenset())
        handle = RemoteEngine(ServerAddress(server.url)).submit(submitted)
        server.wait_for_plan()
        (job,) = server.harness.engine._jobs.values()
        assert job.submission.request == submitted
        handle.cancel()
        server.wait_for_requests(0)


def test_progress_of_a_prompt_arrives(engine: RemoteEngine) -> None:
    events = list(engine.submit(with_stop_tokens(request(*range(100, 190), max_tokens=2), engine)).events())
    progress = [event for event in events if isinstance(event, PrefillProgress)]
    assert progress
    assert all(0 <= report.done < report.total == 90 for report in progress)


def test_a_thinking_budget_and_stop_strings_hold_as_they_do_locally(
    server: SteppedServer, engine: RemoteEngine
) -> None:
    tokenizer = engine.frontend.tokenizer
    think = tokenizer.special_ids["<think>"]
    submitted = Request((60, think), max_tokens=40, sampling=Sampling(seed=5), stop_ids=engine.frontend.stop_ids)
    # The stages sample the ids 0 to 9, so that the text of token 3 ends an answer.
    for limits in (ReplyLimits(thinking_budget=4), ReplyLimits(stop_strings=(tokenizer.token_bytes(3).decode(),))):
        own_tokens, own_finished = tokens_of(
            server.harness.engine.submit(submitted, ReplyPolicy(tokenizer, submitted, limits))
        )
        remote_tokens, finished = tokens_of(engine.submit(submitted, ReplyPolicy(tokenizer, submitted, limits)))
        assert remote_tokens == own_tokens
        assert finished.parts == own_finished.parts
        assert finished.reason is own_finished.reason
    close = tokenizer.special_ids["</think>"]
    budget = ReplyPolicy(tokenizer, submitted, ReplyLimits(thinking_budget=4))
    assert tokens_of(engine.submit(submitted, budget))[0].index(close) <= 4


@pytest.mark.parametrize("priority", [Priority.INTERACTIVE, Priority.BACKGROUND])
def test_a_cancelled_request_ends_here_and_on_the_server(priority: Priority) -> None:
    with stepped_server() as server:
        engine = RemoteEngine(ServerAddress(server.url))
        submitted = request(60, max_tokens=1000, priority=priority)
        handle = engine.submit(submitted)
        server.wait_for_plan()
        (job,) = server.harness.engine._jobs.values()
        assert job.submission.request.priority is priority
        handle.cancel()
        assert [type(event) for event in handle.events()] == [Finished]
        server.wait_for_requests(0)


def test_the_end_of_the_servers_engine_is_a_failure_of_the_request_only() -> None:
    with stepped_server() as server:
        handle = RemoteEngine(ServerAddress(server.url)).submit(request(60, max_tokens=100))
        server.wait_for_plan()
        server.harness.fail_stage(0)
        server.harness.cancel()  # the restart
        with pytest.raises(RequestFailed):
            list(handle.events())


def test_a_request_waits_while_the_servers_stages_start_again() -> None:
    with stepped_server() as server:
        engine = RemoteEngine(ServerAddress(server.url))
        first = engine.submit(request(60, max_tokens=20, seed=2))
        server.wait_for_plan()
        server.harness.fail_stage(0)
        second = engine.submit(request(60, max_tokens=20, seed=2))
        server.wait_for_line("/v1/completions 503")
        server.harness.end_restart()
        with server.running_stages():
            assert tokens_of(first)[0] == tokens_of(second)[0]


def test_a_full_queue_is_an_error_with_the_time_to_wait() -> None:
    with stepped_server(num_slots=1, max_queued=1) as server:
        engine = RemoteEngine(ServerAddress(server.url))
        handles = [engine.submit(request(60, max_tokens=100))]
        server.wait_for_plan()
        handles.append(engine.submit(request(61, max_tokens=100)))
        server.wait_for_requests(2)
        with pytest.raises(EngineBusy) as caught:
            list(engine.submit(request(62)).events())
        assert caught.value.wait_s >= 1
        for handle in handles:
            handle.cancel()
        server.wait_for_requests(0)


def test_a_full_queue_is_waited_for_once_the_answer_has_begun() -> None:
    with stepped_server(num_slots=1, max_queued=1) as server:
        engine = RemoteEngine(ServerAddress(server.url))
        other_handles = [server.harness.engine.submit(request(1, 2, max_tokens=300))]
        server.wait_for_plan()
        other_handles.append(server.harness.engine.submit(request(1, 2, max_tokens=300)))
        tokenizer = engine.frontend.tokenizer
        submitted = request(60, tokenizer.special_ids["<think>"], max_tokens=12, seed=5)
        # With this budget the client itself adds the first token, </think>: the answer has begun.
        handle = engine.submit(submitted, ReplyPolicy(tokenizer, submitted, ReplyLimits(thinking_budget=0)))
        server.wait_for_line("/v1/completions 429")
        for other in other_handles:
            other.cancel()
        with server.running_stages():
            tokens, finished = tokens_of(handle)
        assert tokens[0] == tokenizer.special_ids["</think>"]
        assert (len(tokens), finished.reason) == (12, FinishReason.LENGTH)


def test_the_time_limit_of_an_answer_begins_with_its_prefill(
    engine: RemoteEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited_s = 1000.0
    monkeypatch.setattr(remote_engine, "AnswerTimer", lambda began: AnswerTimer(began - waited_s))
    for timeout_s, reason in ((waited_s / 2, FinishReason.LENGTH), (1e-6, FinishReason.TIMEOUT)):
        submitted = dataclasses.replace(request(60, max_tokens=5), timeout_s=timeout_s)
        assert tokens_of(engine.submit(submitted))[1].reason is reason


@pytest.mark.parametrize("kind", ["comment", "chunk"])
def test_the_time_limit_also_ends_an_answer_while_the_server_sends_only_keepalives(kind: Any) -> None:
    with stepped_server(ServerOptions(keepalive=kind, keepalive_s=0.05)) as server:
        submitted = dataclasses.replace(request(60, max_tokens=100), timeout_s=0.1)
        handle = RemoteEngine(ServerAddress(server.url)).submit(submitted)
        server.run_plans(12)  # the prefill begins, and tokens arrive; then the stages stop
        assert tokens_of(handle)[1].reason is FinishReason.TIMEOUT
        server.wait_for_requests(0)


def test_a_request_that_a_server_cannot_run_is_refused_before_it_is_sent(engine: RemoteEngine) -> None:
    tokenizer = engine.frontend.tokenizer
    stopping = with_stop_tokens(request(60), engine)
    early = ReplyPolicy(tokenizer, stopping, ReplyLimits(min_tokens=3))
    scored = dataclasses.replace(request(60), sampling=Sampling(seed=1, num_logprobs=2))
    for submitted, policy, message in ((stopping, early, "restricts its tokens"), (scored, None, "--logprobs")):
        with pytest.raises(RequestError, match=message):
            engine.submit(submitted, policy)
    with pytest.raises(RequestError, match="outside the vocabulary"):
        engine.submit(request(10**6))


@pytest.mark.parametrize("key", ["k\n", "cl\xe9", "\udce9"])
def test_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    with pytest.raises(SetupError, match="MLX_K2_API_KEY has a line end or a letter that no key has"):
        RemoteEngine(ServerAddress("http://127.0.0.1:1", key))


def test_an_address_without_a_server_is_named() -> None:
    with pytest.raises(SetupError, match=r"no server at http://127.0.0.1:1: Connection refused$"):
        RemoteEngine(ServerAddress("http://127.0.0.1:1"))
    for url in ("127.0.0.1:8080", "ftp://127.0.0.1", "http://", "http://a:b", "http://\udce9"):
        with pytest.raises(SetupError, match="is not the address of a server"):
            RemoteEngine(ServerAddress(url))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"HTTP/1.0 404 Not Found\r\n\r\n<html>", "it answers with status 404"),
        (b'HTTP/1.0 404 Not Found\r\n\r\n{"error": {"message": "Not Found"}}', "it answers with status 404"),
        (b"HTTP/1.0 302 Found\r\nLocation: /login\r\n\r\n", "it answers with status 302"),
        (b"HTTP/1.0 200 OK\r\n\r\n<html>", "its answer to /v1/model-files cannot be read"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "its answer is not HTTP"),
    ],
)
def test_the_server_of_another_program_is_named_as_such(answer: bytes, reason: str) -> None:
    with answering_once(answer) as url, pytest.raises(SetupError, match=f"{url} is not a server of mlx-k2: .*{reason}"):
        RemoteEngine(ServerAddress(url))


@contextmanager
def answering_once(answer: bytes) -> Iterator[str]:
    """Yield the address of a server that sends ``answer`` to its first client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT_S)

        def serve() -> None:
            with listener.accept()[0] as connection:
                connection.settimeout(WAIT_S)
                connection.recv(65536)
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(WAIT_S)


def test_a_key_is_sent(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    key = add_key(path, "alice")
    with stepped_server(keys=KeyRing(path, is_required=True)) as server:
        with pytest.raises(SetupError, match="needs a key"):
            RemoteEngine(ServerAddress(server.url))
        with pytest.raises(SetupError, match="refuses the key"):
            RemoteEngine(ServerAddress(server.url, "wrong"))
        assert RemoteEngine(ServerAddress(server.url, key)).model_name == "tokens"
