"""A server in this process. Its stages execute plans on token ids instead of arrays, each when a test calls for it."""

import functools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.protocol.messages import Step
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.server.access import Access
from mlx_k2.server.api_keys import KeyRing
from mlx_k2.server.app import make_app
from mlx_k2.server.cluster_activity import ClusterActivity
from mlx_k2.server.http_server import HttpServer
from mlx_k2.server.language_model import LanguageModel
from mlx_k2.server.server_state import ServerOptions, ServerState
from mlx_k2.testing.token_stages import TokenStages
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_frontend import ModelFrontend
from mlx_k2.weights.model_source import BUILTIN, ModelSource
from tests.coordinator.token_engine import WAIT_S, TokenEngine, token_engine
from tests.server.http_client import CHAT_PATH, HttpAnswer, connect, exchange, request_bytes, send

CONTEXT_TOKENS = 4000
LONG_PROMPT = "one two three " * 60
"""The prompt for this text has 324 tokens, the one for "a" 24."""
ALLOWED_ORIGIN = "https://chat.example"


@dataclass(frozen=True)
class SteppedServer:
    """A server whose stages execute plans only in ``run_plans`` and in ``running_stages``, and the lines of its log."""

    port: int
    harness: TokenEngine
    lines: list[str]
    state: ServerState

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def num_requests(self) -> int:
        """The number of requests that wait or run in the engine."""
        return len(self.harness.engine._jobs)

    @property
    def num_planned_tokens(self) -> int:
        """The number of tokens in all plans that were sent to the stages."""
        return sum(len(row.token_ids) for step in self.harness.plans for row in step.rows)

    def connect(self) -> socket.socket:
        """Return a connection to the server, with a deadline."""
        return connect(self.port)

    def request(self, method: str, path: str, body: object = None, **headers: str) -> HttpAnswer:
        """Send one request on a separate connection and return the whole answer."""
        with self.connect() as connection:
            return exchange(connection, request_bytes(method, path, body, **headers))

    def send(self, method: str, path: str, body: object = None, **headers: str) -> socket.socket:
        """Send a request on a new connection, and return the connection."""
        return send(self.port, method, path, body, **headers)

    def send_chat(self, text: str = "a", key: str = "", pipelined: bytes | None = None, **fields: Any) -> socket.socket:
        """Send a chat request with a fixed seed, and return its connection.

        ``pipelined`` follows the request on a connection that stays open; with None the request closes its connection.
        """
        body = {"messages": [{"role": "user", "content": text}], "seed": 3} | fields
        headers = {"x-api-key": key, "Connection": "close" if pipelined is None else "keep-alive"}
        connection = self.send("POST", CHAT_PATH, body, **headers)
        connection.sendall(pipelined or b"")
        return connection

    @contextmanager
    def running_stages(self) -> Iterator[None]:
        """Execute all plans on another thread until the context ends."""
        stop = threading.Event()

        def execute_plans() -> None:
            while not stop.is_set():
                num_executed = sum(self.harness.stages.execute(rank) for rank in range(self.harness.limits.num_stages))
                if not num_executed:
                    stop.wait(0.001)

        thread = threading.Thread(target=execute_plans, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(WAIT_S)

    def wait_for_line(self, text: str, count: int = 1) -> None:
        """Wait until ``count`` lines of the log have ``text``."""
        wait_until(lambda: sum(text in line for line in self.lines) >= count, f"{count} lines with {text!r}")

    def wait_for_plan(self) -> None:
        """Wait until the stages have a plan: the first request runs."""
        wait_until(lambda: bool(self.harness.plans), "a first plan")

    def run_plans(self, count: int) -> None:
        """Execute plans until more than ``count`` were sent in all."""
        self.harness.run_until(lambda: len(self.harness.plans) > count)

    def run_all_plans(self) -> None:
        """Execute plans until no stage has one."""
        ranks = range(self.harness.limits.num_stages)
        self.harness.run_until(lambda: all(self.harness.stages.next_step(rank) is None for rank in ranks))

    def wait_for_requests(self, count: int) -> None:
        """Wait until ``count`` requests wait or run in the engine."""
        wait_until(lambda: self.num_requests == count, f"{count} requests in the engine")


@functools.cache
def builtin_frontend() -> ModelFrontend:
    """Return the built-in model's tokenizer, template and grammars, which all servers of this process share."""
    files = read_model_files(ModelSource(path_or_repo=BUILTIN)).files
    return ModelFrontend(describe_model(files, str(BUILTIN_FOLDER)), CONTEXT_TOKENS)


@contextmanager
def stepped_server(
    options: ServerOptions | None = None,
    num_slots: int = 1,
    max_queued: int = 4,
    chunk_tokens: int = 8,
    keys: KeyRing | None = None,
    *,
    drafts: bool = False,
    make_stages: Callable[[int, Callable[[Step], None]], TokenStages] = TokenStages,
) -> Iterator[SteppedServer]:
    """Yield a server over stages without arithmetic, with the built-in model's tokenizer and template."""
    state = ServerState(options or ServerOptions(), "tokens", ClusterActivity())
    lines: list[str] = []
    app = make_app(state, Access(hosts=(), origins=(ALLOWED_ORIGIN,), keys=keys), lines.append)
    with (
        token_engine(
            num_slots,
            chunk_tokens,
            context_tokens=CONTEXT_TOKENS,
            draft_mode=DraftMode.NGRAM if drafts else DraftMode.OFF,
            max_queued=max_queued,
            make_stages=make_stages,
        ) as harness,
        HttpServer(app, "127.0.0.1", 0, drain_s=1) as server,
    ):
        state.serve(harness.engine, LanguageModel(builtin_frontend(), "tokens"))
        yield SteppedServer(int(server.url.rpartition(":")[2]), harness, lines, state)


def wait_until(is_true: Callable[[], bool], description: str) -> None:
    """Wait until ``is_true()``, with a deadline. The error has the description."""
    pause = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if is_true():
            return
        pause.wait(0.005)
    raise AssertionError(f"not within {WAIT_S} s: {description}")
