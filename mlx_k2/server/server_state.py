"""The state that all routes share: the engine and the model once they are loaded, running requests. Knows no routes."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Event, Token
from mlx_k2.errors import EngineBusy, MlxK2Error
from mlx_k2.server.api_errors import ApiError, to_api_error, unavailable_error
from mlx_k2.server.cluster_activity import ClusterActivity
from mlx_k2.server.event_stream import EventStream
from mlx_k2.server.language_model import Generation, LanguageModel
from mlx_k2.server.metrics import Metrics
from mlx_k2.server.request_record import RequestRecord
from mlx_k2.server.sse import KEEPALIVE_S

_MAX_TOKEN_REQUESTS = 64
"""The most simultaneous requests that only count or convert tokens; their bodies are in memory."""


@dataclass(frozen=True)
class ServerOptions:
    """The user's options for answers."""

    keepalive: Literal["comment", "chunk", "off"] = "comment"
    keepalive_s: float = KEEPALIVE_S
    strict_model: bool = False
    """Whether to refuse a request that names another model."""
    mirrors_reasoning: bool = False
    """Whether to send the reasoning of chat completions as ``reasoning``, too, not only as ``reasoning_content``."""


@dataclass(frozen=True)
class _Loaded:
    engine: Engine
    model: LanguageModel


class ServerState:
    """The state of one server, for its event loop. Another thread calls ``serve`` once, when the stages are ready.

    Worker threads call ``check_model``, which reads constants only.
    """

    def __init__(self, options: ServerOptions, model_name: str, activity: ClusterActivity) -> None:
        self.options = options
        self.activity = activity
        self.model_name = model_name
        self.created = int(time.time())
        self.records: dict[str, RequestRecord] = {}
        self.is_ending = False
        """True when the server begins to end: streams that have no end of their own end then."""
        self.metrics = Metrics(self.records, activity, lambda: () if self._loaded is None else self._loaded.engine.use)
        self._streams: dict[str, EventStream] = {}
        self._loaded: _Loaded | None = None
        self._num_preparing = {True: 0, False: 0}
        """The number of requests in ``preparing``, by ``is_queued``."""

    def serve(self, engine: Engine, model: LanguageModel) -> None:
        """Accept requests from now on."""
        self._loaded = _Loaded(engine, model)

    @property
    def name(self) -> Literal["loading", "restarting", "ready"]:
        """The state as /v1/status names it."""
        if self._loaded is None:
            return "loading"
        return "restarting" if self._loaded.engine.is_restarting else "ready"

    @property
    def context_tokens(self) -> int | None:
        """The most tokens of a sequence, prompt and answer; None while the model is loading."""
        return None if self._loaded is None else self._loaded.model.context_tokens

    def model(self) -> LanguageModel:
        """Return the model, also while the stages restart.

        Raises:
            ApiError: 503, the model is loading.
        """
        if self._loaded is None:
            raise unavailable_error("the model is loading")
        return self._loaded.model

    def check_ready(self) -> None:
        """Check that a request can begin now.

        Raises:
            ApiError: 503, the model is loading or the stages restart.
        """
        if self.name == "restarting":
            raise unavailable_error("the stages start again after a fault")
        self.model()

    @contextmanager
    def preparing(self, *, is_queued: bool) -> Iterator[None]:
        """Count a request while its body is read and its prompt tokenized. ``is_queued``: it goes to the engine then.

        Raises:
            ApiError: 429, a request for the engine would find its queue full, or _MAX_TOKEN_REQUESTS requests that only
                count or convert tokens are being prepared.
        """
        assert self._loaded is not None, "model() was called"
        engine = self._loaded.engine
        limit = engine.max_requests - len(self.records) if is_queued else _MAX_TOKEN_REQUESTS
        if self._num_preparing[is_queued] >= limit:
            raise to_api_error(EngineBusy("", engine.expected_wait_s))  # to_api_error does not use the text
        self._num_preparing[is_queued] += 1
        try:
            yield
        finally:
            self._num_preparing[is_queued] -= 1

    def check_model(self, name: str | None) -> None:
        """Check a request's model name.

        Raises:
            ApiError: 404, it is another model's, and ``strict_model`` is set.
        """
        if self.options.strict_model and name not in (None, self.model_name):
            raise self.unknown_model(str(name))

    def unknown_model(self, name: str) -> ApiError:
        """Return the error 404 for the name of another model."""
        message = f"the model {name[:200]!r} is not served here: {self.model_name!r} is"
        return ApiError(404, "not_found_error", message, param="model", code="model_not_found")

    async def open(self, request_id: str, owner: str, generation: Generation) -> EventStream:
        """Submit the requests of a generation; return their events. Each has a record until the stream is closed.

        Raises:
            ApiError: the engine refuses them.
        """
        assert self._loaded is not None, "a generation was made, so the model is loaded"
        num_prompt = len(generation.submissions[0].request.prompt_ids)
        ids = [f"{request_id}-{index}" if index else request_id for index in range(len(generation.submissions))]
        records = [RequestRecord(choice_id, owner, prompt_total=num_prompt) for choice_id in ids]

        def on_event(index: int, event: Event) -> None:
            self.metrics.add(records[index], event)
            if isinstance(event, Token):
                self.activity.add_token()
            records[index].add(event)

        stream = EventStream(on_event, lambda: self._close(ids))
        self.records.update(zip(ids, records, strict=True))
        self._streams.update(dict.fromkeys(ids, stream))
        try:
            await stream.submit(self._loaded.engine, generation)
        except MlxK2Error as error:
            self._close(ids)
            raise to_api_error(error) from None
        except BaseException:
            self._close(ids)
            raise
        return stream

    def cancel(self, request_id: str, owner: str) -> None:
        """End a request; its answer ends as if the model had stopped.

        Raises:
            ApiError: 404, no such request runs, or it belongs to another key.
        """
        record = self.records.get(request_id)
        if record is None or record.owner != owner:
            raise ApiError(404, "not_found_error", "no such request is running", code="request_not_found")
        self._streams[request_id].cancel()

    def status(self, owner: str) -> dict[str, Any]:
        """Return the fields of /v1/status for the owner of a key."""
        records = list(self.records.values())
        return {
            "model": self.model_name,
            "state": self.name,
            "phase": "" if self.name == "ready" else self.activity.phase,
            "context_tokens": self.context_tokens,
            "slots": None if self._loaded is None else self._loaded.engine.num_slots,
            "uptime_s": int(time.time()) - self.created,
            "faults": self.activity.faults.total(),
            "restarts": self.activity.num_restarts,
            "stages": self.activity.stages(),
            "requests": [record.fields(is_own=record.owner == owner) for record in records],
        }

    def _close(self, ids: Sequence[str]) -> None:
        for choice_id in ids:
            self.records.pop(choice_id, None)
            self._streams.pop(choice_id, None)
