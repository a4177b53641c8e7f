"""Remote engine: runs requests of this process on a server, with the interface of `coordinator.engine.Engine`.

The server computes tokens. The token policy runs here: text, stop strings, thinking budget. When it forces tokens, the
rest of the answer is a new request, whose prompt ends with them: the server's cache holds the beginning.
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
from mlx_k2.errors import EngineBusy, MlxK2Error, RequestError, RequestFailed, SetupError
from mlx_k2.json_text.read import read_json
from mlx_k2.scheduling.request import FinishReason, Priority, Request, check_request
from mlx_k2.scheduling.token_policy import TokenPolicy
from mlx_k2.text.reply_parts import Part
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.index import CONFIG_NAME, CheckpointIndex
from mlx_k2.weights.model_frontend import ModelFrontend

RESTART_S = 600.0
_RETRY_S = 0.5


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
class _Run:
    """One request: its connection, and its tokens so far."""

    request: Request
    policy: TokenPolicy
    connection: http.client.HTTPConnection
    timer: AnswerTimer
    token_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    is_cancelled: bool = False

    def finished(self, reason: FinishReason, parts: tuple[Part, ...] = ()) -> Finished:
        """Return the end of the request for ``reason``."""
        return Finished(self.timer.summary(self.request, reason, self.num_cached), parts)


class RemoteEngine:
    """The engine of the server at ``address``, whose model is ``frontend``.

    Raises:
        SetupError: there is no server, it refuses the key, or its model cannot be read.
        ClusterError: the model is loading.
    """

    def __init__(self, address: ServerAddress) -> None:
        self._address = address
        model = address.get("/v1/model-files", _ModelFiles)
        try:
            config = ModelConfig.from_json(model.files[CONFIG_NAME], f"{address.url} {CONFIG_NAME}")
        except KeyError:
            raise SetupError(f"{address.url} sends no files of a model") from None
        index = CheckpointIndex({}, address.url)
        self.model_name = model.name
        self.frontend = ModelFrontend(
            ModelDescription(model.files, config, index, model.digest, None), model.context_tokens
        )

    def submit(self, request: Request, policy: TokenPolicy | None = None) -> Handle:
        """Run a request and return its handle. Any thread may call this.

        Raises:
            RequestError: the request can never run, or needs a feature that a server does not have.
        """
        check_request(request, self.frontend.model.config.vocab_size, self.frontend.context_tokens)
        policy = policy or TokenPolicy()
        if request.sampling.num_logprobs is not None:
            raise RequestError("--connect gets no log-probabilities: leave out --logprobs")
        if policy.token_mask(()) is not None:
            raise RequestError("a request that restricts its tokens cannot be sent to a server")
        run = _Run(request, policy, self._address.open(), AnswerTimer(time.perf_counter()))

        def cancel(handle: Handle) -> None:
            run.is_cancelled = True
            if handle.end(run.finished(FinishReason.CANCELLED)):
                shut_down(run.connection)

        handle = Handle(request, cancel)
        threading.Thread(target=self._run, args=[run, handle], name="remote request", daemon=True).start()
        return handle

    def _run(self, run: _Run, handle: Handle) -> None:
        """Put the events of the request into its handle."""
        try:
            reason = None
            while reason is None:
                reason = _put_forced(run, handle)
                reason = reason or (FinishReason.CANCELLED if run.is_cancelled else self._stream(run, handle))
            handle.end(run.finished(reason, run.policy.finish().parts))
        except MlxK2Error as error:
            handle.end(error)
        except Exception as error:  # noqa: BLE001 - the reader must not wait without end
            handle.end(RequestFailed(f"request ended by an error: {type(error).__name__}"))
        finally:
            run.connection.close()

    def _stream(self, run: _Run, handle: Handle) -> FinishReason | None:
        """Put sampled tokens until the answer ends; return why. None: forced tokens follow."""
        response = self._send(run)
        is_first, reason = not run.token_ids, None
        for data in event_data(response):
            if run.is_cancelled:
                return FinishReason.CANCELLED
            chunk = read_json(data, _Chunk)
            if chunk.usage is not None and is_first:
                run.num_cached = chunk.usage.cached_tokens
            if chunk.prompt_progress is not None and is_first:
                handle.put_progress(PrefillProgress(chunk.prompt_progress.processed, chunk.prompt_progress.total))
            for token_id in (number for choice in chunk.choices for number in choice.token_ids):
                reason = _put_token(run, handle, token_id, is_forced=False)
                # the server may end the answer at the same token, and then sends the usage
                server_ends = token_id in run.request.stop_ids or len(run.token_ids) >= run.request.max_tokens
                if reason is not None and not server_ends:
                    return reason
                if reason is None and run.policy.forced():
                    return None
        return reason or FinishReason.STOP  # without a reason: it was cancelled on the server

    def _send(self, run: _Run) -> http.client.HTTPResponse:
        """Send the request for the rest of the answer.

        Wait up to RESTART_S for a server whose stages start again, or whose queue is full in the middle of an answer.
        """
        ends_at = time.monotonic() + RESTART_S
        while True:
            run.connection.close()  # of the part of the answer before
            try:
                return self._address.send(run.connection, "POST", "/v1/completions", _body(run))
            except (Unavailable, EngineBusy) as error:
                is_refused = isinstance(error, EngineBusy) and not run.token_ids
                if is_refused or run.is_cancelled or time.monotonic() > ends_at:
                    raise
                wait_s = error.wait_s if isinstance(error, EngineBusy) else _RETRY_S
            time.sleep(wait_s)


def _body(run: _Run) -> dict[str, Any]:
    """Return the body of the request for the rest of the answer."""
    asked = run.request
    sampling = {name: value for name, value in msgspec.structs.asdict(asked.sampling).items() if value is not None}
    sampling["logit_bias"] = {str(token_id): bias for token_id, bias in asked.sampling.logit_bias}
    return sampling | {
        "prompt": [*asked.prompt_ids, *run.token_ids],
        "max_tokens": asked.max_tokens - len(run.token_ids),
        "stream": True,
        "return_token_ids": True,
        "ignore_eos": not asked.stop_ids,
        "return_progress": True,
        "stream_options": {"include_usage": True},
        "service_tier": "flex" if asked.priority is Priority.BACKGROUND else "auto",
    }


def _put_forced(run: _Run, handle: Handle) -> FinishReason | None:
    """Put the tokens that the policy forces; return why the answer ends, None if it continues."""
    reason = None
    while reason is None and (forced := run.policy.forced()):
        for token_id in forced:
            reason = reason or _put_token(run, handle, token_id, is_forced=True)
    return reason


def _put_token(run: _Run, handle: Handle, token_id: int, *, is_forced: bool) -> FinishReason | None:
    """Put one token; return why the answer ends, None if it continues."""
    now = time.perf_counter()
    run.timer.add(now, is_forced=is_forced)
    run.token_ids.append(token_id)
    accepted = run.policy.accept(token_id)
    handle.put_token(Token(token_id, accepted.text, accepted.parts, is_forced=is_forced, arrived_at=now))
    if token_id in run.request.stop_ids:
        return FinishReason.STOP
    if accepted.finish_reason is not None:
        return accepted.finish_reason
    if len(run.token_ids) >= run.request.max_tokens:
        return FinishReason.LENGTH
    timeout_s = run.request.timeout_s
    return FinishReason.TIMEOUT if timeout_s is not None and now - run.timer.began > timeout_s else None
