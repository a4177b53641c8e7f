"""Remote engine: runs requests of this process on a server, with the interface of `coordinator.engine.Engine`.

The server computes tokens. The token policy runs here: text, stop strings, thinking budget. When it forces tokens, the
rest of the answer is a new request, whose prompt ends with them: the server's cache holds the beginning.
"""

import base64
import http.client
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mlx_k2.client.server_connection import ServerAddress, Unavailable, event_data, shut_down
from mlx_k2.config import ModelConfig
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Finished, Handle, PrefillProgress, Token
from mlx_k2.errors import EngineBusy, MlxK2Error, RequestError, RequestFailed, SetupError
from mlx_k2.json_text.read import read_json
from mlx_k2.scheduling.request import FinishReason, Priority, Request, check_request
from mlx_k2.scheduling.token_policy import AnyToken, TokenPolicy
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
    files: dict[str, str]


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
    """One request: its connection, and what it has so far. Times are of time.perf_counter."""

    request: Request
    policy: TokenPolicy
    connection: http.client.HTTPConnection
    began: float = field(default_factory=time.perf_counter)
    token_ids: list[int] = field(default_factory=list)
    num_sampled: int = 0
    num_cached: int = 0
    first: float | None = None
    last: float = 0.0
    is_cancelled: bool = False

    def summary(self, reason: FinishReason) -> AnswerSummary:
        """Return the summary of the answer so far."""
        num_prompt = len(self.request.prompt_ids)
        first_s = None if self.first is None else self.first - self.began
        decode_s = 0.0 if self.first is None else self.last - self.first
        return AnswerSummary(
            prompt_tokens=num_prompt,
            cached_tokens=self.num_cached,
            generated_tokens=len(self.token_ids),
            finish_reason=reason,
            seed=self.request.sampling.seed,
            time_to_first_token_s=first_s,
            prefill_tokens_per_s=(num_prompt - self.num_cached) / first_s if first_s else None,
            decode_tokens_per_s=(self.num_sampled - 1) / decode_s if decode_s > 0 else None,
        )


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
            files = {name: base64.b64decode(text, validate=True) for name, text in model.files.items()}
            config = ModelConfig.from_json(files[CONFIG_NAME], f"{address.url} {CONFIG_NAME}")
        except (ValueError, KeyError):
            raise SetupError(f"{address.url} sends no files of a model") from None
        index = CheckpointIndex({}, address.url)
        self.model_name = model.name
        self.frontend = ModelFrontend(ModelDescription(files, config, index, model.digest, None), model.context_tokens)

    def submit(
        self,
        request: Request,
        policy: TokenPolicy | None = None,
        notify: Callable[[Handle], None] | None = None,
    ) -> Handle:
        """Run a request and return its handle. Any thread may call this.

        Raises:
            RequestError: the request can never run, or needs what a server does not do.
        """
        check_request(request, self.frontend.model.config.vocab_size, self.frontend.context_tokens)
        policy = policy or AnyToken()
        if request.sampling.num_logprobs is not None:
            raise RequestError("--connect gets no log-probabilities: leave out --logprobs")
        if policy.token_mask(()) is not None:
            raise RequestError("a request that restricts its tokens cannot be sent to a server")
        run = _Run(request, policy, self._address.open())

        def cancel(handle: Handle) -> None:
            run.is_cancelled = True
            if handle.end(Finished(run.summary(FinishReason.CANCELLED))):
                shut_down(run.connection)

        handle = Handle(request, cancel, notify)
        threading.Thread(target=self._run, args=[run, handle], name="remote request", daemon=True).start()
        return handle

    def _run(self, run: _Run, handle: Handle) -> None:
        """Put the events of the request into its handle."""
        try:
            reason = None
            while reason is None:
                reason = _put_forced(run, handle)
                reason = reason or (FinishReason.CANCELLED if run.is_cancelled else self._stream(run, handle))
            handle.end(Finished(run.summary(reason), run.policy.finish().parts))
        except MlxK2Error as error:
            handle.end(error)
        except Exception as error:  # noqa: BLE001 - the reader must not wait for ever
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
                if reason is not None and not _server_also_stops(run):
                    return reason
                if reason is None and run.policy.forced():
                    return None
        return reason or FinishReason.STOP  # without a reason, somebody has cancelled it on the server

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


def _server_also_stops(run: _Run) -> bool:
    """Return whether the server ends the answer at the same token. It then sends the usage."""
    return run.token_ids[-1] in run.request.stop_ids or len(run.token_ids) >= run.request.max_tokens


def _put_forced(run: _Run, handle: Handle) -> FinishReason | None:
    """Put the tokens that the policy forces; return why the answer ends, None if it goes on."""
    reason = None
    while reason is None and (forced := run.policy.forced()):
        for token_id in forced:
            reason = reason or _put_token(run, handle, token_id, is_forced=True)
    return reason


def _put_token(run: _Run, handle: Handle, token_id: int, *, is_forced: bool) -> FinishReason | None:
    """Put one token; return why the answer ends, None if it goes on."""
    run.last = time.perf_counter()
    run.first = run.first or run.last
    run.token_ids.append(token_id)
    run.num_sampled += not is_forced
    accepted = run.policy.accept(token_id)
    handle.put_token(Token(token_id, accepted.text, accepted.parts, is_forced=is_forced, arrived_at=run.last))
    if token_id in run.request.stop_ids:
        return FinishReason.STOP
    if accepted.finish_reason is not None:
        return accepted.finish_reason
    if len(run.token_ids) >= run.request.max_tokens:
        return FinishReason.LENGTH
    timeout_s = run.request.timeout_s
    return FinishReason.TIMEOUT if timeout_s is not None and run.last - run.began > timeout_s else None
