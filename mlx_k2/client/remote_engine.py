"""Remote engine: runs requests of this process on a server, with the method `submit` of `coordinator.engine.Engine`.

The server computes tokens. The token policy runs here: text, stop strings, thinking budget. When the policy forces
tokens, the rest of the answer is a new HTTP request, whose prompt ends with these tokens. The server's cache has the
beginning of this prompt.
"""

import http.client
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mlx_k2.client.server_connection import ServerAddress, Unavailable, event_data, shut_down
from mlx_k2.config import ModelConfig
from mlx_k2.coordinator.answer_summary import AnswerTimer
from mlx_k2.coordinator.handle import Finished, Handle, PrefillProgress, Token
from mlx_k2.errors import ClusterError, EngineBusy, MlxK2Error, RequestError, RequestFailed, SetupError
from mlx_k2.json_text.read import read_json
from mlx_k2.scheduling.request import FinishReason, Priority, Request, check_request
from mlx_k2.scheduling.token_policy import TokenPolicy
from mlx_k2.text.reply_parts import Part
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.index import CONFIG_NAME, CheckpointIndex
from mlx_k2.weights.model_frontend import ModelFrontend

RESTART_TIMEOUT_S = 600.0
_RETRY_INTERVAL_S = 0.5


class _ModelFiles(msgspec.Struct, frozen=True):
    """The answer of /v1/model-files."""

    name: str
    digest: str
    context_tokens: int
    files: dict[str, bytes]


class _Choice(msgspec.Struct, frozen=True):
    token_ids: tuple[int, ...] = ()


class _PromptProgress(msgspec.Struct, frozen=True):
    processed: int
    total: int


class _Usage(msgspec.Struct, frozen=True):
    cached_tokens: int


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    prompt_progress: _PromptProgress | None = None
    usage: _Usage | None = None


@dataclass
class _RemoteRequest:
    """A request that runs on a server: its connection, and its tokens so far."""

    request: Request
    policy: TokenPolicy
    connection: http.client.HTTPConnection
    timer: AnswerTimer
    token_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    prefill_began: float | None = None
    """When the prompt's first progress arrived, or the first sampled token (time.perf_counter)."""
    is_cancelled: bool = False

    @property
    def is_full(self) -> bool:
        """Whether the answer has ``max_tokens`` tokens."""
        return len(self.token_ids) >= self.request.max_tokens

    @property
    def is_late(self) -> bool:
        """Whether ``timeout_s`` has passed since the prefill began."""
        began, timeout_s = self.prefill_began, self.request.timeout_s
        return began is not None and timeout_s is not None and time.perf_counter() - began > timeout_s

    def finished(self, reason: FinishReason, parts: tuple[Part, ...] = ()) -> Finished:
        """Return the event for the end of the request."""
        return Finished(self.timer.summary(self.request, reason, self.num_cached), parts)


class RemoteEngine:
    """The engine of the server at ``address``. ``frontend`` has the tokenizer and the template of the server's model.

    Raises:
        SetupError: there is no server, the server refuses the key, or its model cannot be read.
        ClusterError: the model is loading.
    """

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        model = address.get("/v1/model-files", _ModelFiles)
        try:
            config = ModelConfig.from_json(model.files[CONFIG_NAME], f"{address.url} {CONFIG_NAME}")
        except KeyError:
            raise SetupError(f"{address.url} sends no files of a model") from None
        index = CheckpointIndex(weight_map={}, source=address.url)  # no weights are read here
        self.model_name = model.name
        self.frontend = ModelFrontend(
            ModelDescription(model.files, config, index, model.digest, unread_tensors_line=None), model.context_tokens
        )

    def submit(self, request: Request, policy: TokenPolicy | None = None) -> Handle:
        """Run a request and return its handle. Any thread may call this.

        Raises:
            RequestError: the request cannot run, or needs a feature that a remote engine does not have.
        """
        check_request(request, self.frontend.model.config.vocab_size, self.frontend.context_tokens)
        policy = policy or TokenPolicy()
        if request.sampling.num_logprobs is not None:
            raise RequestError("--connect gets no log-probabilities: leave out --logprobs")
        if policy.token_mask(()) is not None:
            raise RequestError("a request that restricts its tokens cannot be sent to a server")
        remote = _RemoteRequest(request, policy, self._address.open(), AnswerTimer(time.perf_counter()))

        def cancel(handle: Handle) -> None:
            remote.is_cancelled = True
            if handle.end(remote.finished(FinishReason.CANCELLED)):
                shut_down(remote.connection)

        handle = Handle(request, cancel)
        threading.Thread(target=self._run_request, args=[remote, handle], name="remote request", daemon=True).start()
        return handle

    def _run_request(self, remote: _RemoteRequest, handle: Handle) -> None:
        """Run the request to its end; put its events into ``handle``."""
        try:
            reason = None
            while reason is None:
                reason = _put_forced(remote, handle)
                if reason is None:
                    reason = FinishReason.CANCELLED if remote.is_cancelled else self._stream(remote, handle)
            handle.end(remote.finished(reason, remote.policy.finish().parts))
        except ClusterError as error:  # no stage of this process: the server can come back, and answer a later request
            handle.end(RequestFailed(str(error)))
        except MlxK2Error as error:
            handle.end(error)
        except Exception as error:  # noqa: BLE001 - the reader of the handle must not wait forever
            handle.end(RequestFailed(f"request ended by an error: {type(error).__name__}"))
        finally:
            remote.connection.close()

    def _stream(self, remote: _RemoteRequest, handle: Handle) -> FinishReason | None:
        """Put sampled tokens into ``handle`` until the answer ends; return why. None: forced tokens follow."""
        response = self._send(remote)
        # Only the first HTTP request computes the prompt; a later one finds it in the cache.
        is_first, reason = not remote.token_ids, None
        for data in event_data(response):
            if remote.is_cancelled:
                return FinishReason.CANCELLED
            chunk = read_json(data, _Chunk)
            if chunk.usage is not None and is_first:
                remote.num_cached = chunk.usage.cached_tokens
            if chunk.prompt_progress is not None:
                remote.prefill_began = remote.prefill_began or time.perf_counter()
                if is_first:
                    handle.put_progress(PrefillProgress(chunk.prompt_progress.processed, chunk.prompt_progress.total))
            for token_id in (number for choice in chunk.choices for number in choice.token_ids):
                reason = _put_token(remote, handle, token_id, is_forced=False)
                # If the server ends the answer at this token, too, its usage follows: read on.
                server_ends = token_id in remote.request.stop_ids or remote.is_full
                if reason is not None and not server_ends:
                    return reason
                if reason is None and remote.policy.forced():
                    return None
            if reason is None and remote.is_late:
                return FinishReason.TIMEOUT
        return reason or FinishReason.STOP  # no reason: the request was cancelled on the server

    def _send(self, remote: _RemoteRequest) -> http.client.HTTPResponse:
        """Send the HTTP request for the rest of the answer; return its response.

        Wait up to RESTART_TIMEOUT_S while the stages restart, or while the queue is full after an answer has begun.
        """
        deadline = time.monotonic() + RESTART_TIMEOUT_S
        while True:
            remote.connection.close()  # the connection may have the rest of an earlier response
            try:
                return self._address.send(remote.connection, "POST", "/v1/completions", _body(remote))
            except (Unavailable, EngineBusy) as error:
                is_refused = isinstance(error, EngineBusy) and not remote.token_ids
                if is_refused or remote.is_cancelled or time.monotonic() > deadline:
                    raise
                wait_s = error.wait_s if isinstance(error, EngineBusy) else _RETRY_INTERVAL_S
            time.sleep(wait_s)


def _body(remote: _RemoteRequest) -> dict[str, Any]:
    """Return the body of the HTTP request for the rest of the answer."""
    request = remote.request
    sampling = {name: value for name, value in msgspec.structs.asdict(request.sampling).items() if value is not None}
    sampling["logit_bias"] = {str(token_id): bias for token_id, bias in request.sampling.logit_bias}
    return sampling | {
        "prompt": [*request.prompt_ids, *remote.token_ids],
        "max_tokens": request.max_tokens - len(remote.token_ids),
        "stream": True,
        "return_token_ids": True,
        "ignore_eos": not request.stop_ids,
        "return_progress": True,
        "stream_options": {"include_usage": True},
        "service_tier": "flex" if request.priority is Priority.BACKGROUND else "auto",
    }


def _put_forced(remote: _RemoteRequest, handle: Handle) -> FinishReason | None:
    """Put the tokens that the policy forces into ``handle``; return why the answer ends, None if it continues."""
    while forced := remote.policy.forced():
        for token_id in forced:
            if (reason := _put_token(remote, handle, token_id, is_forced=True)) is not None:
                return reason
    return None


def _put_token(remote: _RemoteRequest, handle: Handle, token_id: int, *, is_forced: bool) -> FinishReason | None:
    """Put one token into ``handle``; return why the answer ends, None if it continues."""
    now = time.perf_counter()
    if not is_forced:
        remote.prefill_began = remote.prefill_began or now
    remote.timer.add(now, is_forced=is_forced)
    remote.token_ids.append(token_id)
    accepted = remote.policy.accept(token_id)
    handle.put_token(Token(token_id, accepted.text, accepted.parts, is_forced=is_forced, arrived_at=now))
    if token_id in remote.request.stop_ids:
        return FinishReason.STOP
    if accepted.finish_reason is not None:
        return accepted.finish_reason
    if remote.is_full:
        return FinishReason.LENGTH
    return FinishReason.TIMEOUT if remote.is_late else None
