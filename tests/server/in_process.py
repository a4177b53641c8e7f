"""A server in this process, whose stages execute plans on token ids, without arithmetic, when a test calls them."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
from tests.server.server_process import HttpAnswer, request_on

CONTEXT_TOKENS = 4000


@dataclass(frozen=True)
class SteppedServer:
    """A server whose stages execute plans in ``tokens.run`` only, and the lines of its log."""

    port: int
    tokens: TokenEngine
    lines: list[str]
    state: ServerState

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: object = None, **headers: str) -> HttpAnswer:
        """Send one request on a separate connection and return the complete answer."""
        return request_on(self.port, method, path, body, **headers)

    def wait_for(self, text: str, count: int = 1) -> None:
        """Wait until ``count`` lines of the log have ``text``."""
        wait_until(lambda: sum(text in line for line in self.lines) >= count, f"{count} lines with {text!r}")

    @property
    def num_used(self) -> int:
        """The number of requests that wait or run in the engine."""
        return len(self.tokens.engine._jobs)


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
    """Yield a server with the built-in model's tokenizer and template, and stages without arithmetic."""
    state = ServerState(options or ServerOptions(), "tokens", ClusterActivity())
    lines: list[str] = []
    app = make_app(state, Access((), ("https://chat.example",), keys), lines.append)
    with (
        token_engine(
            num_slots,
            chunk_tokens,
            context_tokens=CONTEXT_TOKENS,
            draft_mode=DraftMode.NGRAM if drafts else DraftMode.OFF,
            max_queued=max_queued,
            make_stages=make_stages,
        ) as tokens,
        HttpServer(app, "127.0.0.1", 0, drain_s=1) as server,
    ):
        state.serve(tokens.engine, LanguageModel(builtin_frontend(), "tokens"))
        yield SteppedServer(int(server.url.rpartition(":")[2]), tokens, lines, state)


@contextmanager
def stepping(server: SteppedServer) -> Iterator[None]:
    """Execute the stages' plans on another thread until the block ends."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            if not sum(server.tokens.stages.execute(rank) for rank in range(2)):
                stop.wait(0.001)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join(WAIT_S)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Wait until ``holds()`` is true; ``what`` names this in the error."""
    pause = threading.Event()
    for _ in range(int(WAIT_S / 0.005)):
        if holds():
            return
        pause.wait(0.005)
    raise AssertionError(f"not within {WAIT_S} s: {what}")
