"""The Python API: a cluster that answers prompts, for programs with threads and for programs with asyncio.

Knows no terminal and no command line. Messages of the program go to the logger ``mlx_k2``.
"""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import chain
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from mlx_k2.chat.completion import Completion, completion_of, encode_prompt, submissions_for
from mlx_k2.chat.sampling_options import SamplingOptions as Sampling  # the API's name; not mlx_k2.sampling.Sampling
from mlx_k2.chat.sampling_options import reply_settings
from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.batch_results import answer_all
from mlx_k2.coordinator.engine import MAX_QUEUED, Engine, engine_on
from mlx_k2.coordinator.handle import Event, Finished, Handle, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.deployment.cluster_options import LEASE_S, ClusterOptions, deployment_request, open_source
from mlx_k2.deployment.dry_run import preview
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.restarting import WAITING, Restart, RestartingDeployment
from mlx_k2.errors import ClusterError, MlxK2Error, RequestError, RequestFailed
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import convert
from mlx_k2.launch.group import STALL_TIMEOUT_S
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.message import Message, num_calls
from mlx_k2.text.reply_parts import Content, Part, Reasoning, whole_reply
from mlx_k2.text.template_process import template_process
from mlx_k2.weights.model_frontend import ModelFrontend

__all__ = [
    "AsyncCluster",
    "AsyncStream",
    "Cluster",
    "Completion",
    "Content",
    "MlxK2Error",
    "Prompt",
    "Reasoning",
    "Sampling",
    "Stream",
]

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]
"""A prompt: the text of a user's message, or the messages of a conversation in OpenAI's format."""
ToolDeclarations: TypeAlias = Sequence[Mapping[str, Any]]
"""Declarations of tools in OpenAI's format. Nothing runs the calls of a reply."""

_LOG = logging.getLogger("mlx_k2")
_DEFAULTS = Sampling()


class _RunOptions(msgspec.Struct, frozen=True):
    """The arguments of a cluster that ClusterOptions does not have: slots, drafts and restarts."""

    num_sequences: Annotated[int, msgspec.Meta(ge=1, le=256)]
    draft: DraftMode
    restarts: Annotated[int, msgspec.Meta(ge=0, le=1000)]


class _Listener(DeploymentListener):
    """A listener that writes to the log."""

    def log(self, line: str) -> None:
        _LOG.debug("%s", line)

    def notify(self, line: str) -> None:
        _LOG.warning("%s", line)

    def phase(self, what: str) -> None:
        _LOG.info("%s", what)


class _Reply:
    """The received part of a reply. ``num_calls_before`` is the number of tool calls in the conversation before it."""

    def __init__(self, num_calls_before: int = 0) -> None:
        self.num_calls_before = num_calls_before
        self._parts: list[Part] = []
        self._summary: AnswerSummary | None = None

    def add(self, event: Event) -> list[Reasoning | Content]:
        """Add the parts that an event completes, and return those that are text."""
        if isinstance(event, Finished):
            self._summary = event.summary
        elif not isinstance(event, Token):
            return []
        self._parts += event.parts
        return [part for part in event.parts if isinstance(part, Reasoning | Content)]

    @property
    def is_complete(self) -> bool:
        """Whether the last event of the reply was added."""
        return self._summary is not None

    @property
    def completion(self) -> Completion:
        """The complete reply."""
        if self._summary is None:
            raise RequestError(
                "the reply is not complete, because its stream was closed or has failed: send the prompt again"
            )
        return completion_of(whole_reply(self._parts), self._summary, self.num_calls_before)


class Stream(Iterator[Reasoning | Content]):
    """The text of a reply in parts, as they are sampled.

    Closing it, or dropping the last reference to it, cancels the request. Reading raises RequestFailed if this request
    failed, and ClusterError if the stages failed and are not restarted.
    """

    def __init__(self, handle: Handle, num_calls_before: int) -> None:
        self._handle = handle
        self._reply = _Reply(num_calls_before)
        # refers to _Reply and not to self, so that dropping the stream cancels the request
        self._parts = chain.from_iterable(map(self._reply.add, handle.events()))

    def __del__(self) -> None:
        self.close()

    def __next__(self) -> Reasoning | Content:
        return next(self._parts)

    def close(self) -> None:
        """Cancel the request, unless the reply is complete. Any thread may call this, also while another one reads."""
        self._handle.cancel()

    def completion(self) -> Completion:
        """Read the stream to its end and return the complete reply."""
        for _ in self._parts:
            pass
        return self._reply.completion


class _Cluster:
    """Common part of both kinds of cluster: options, start, end, and the request for a prompt."""

    def __init__(
        self,
        *,
        hostfile: str | os.PathLike[str] | None = None,
        model: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        num_stages: int | None = None,
        split: Sequence[int] | None = None,
        context_tokens: int | None = None,
        dtype: Literal["bfloat16", "float32"] | None = None,
        dense_bits: Literal[8, 4] | None = None,
        lease_s: float = LEASE_S,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        check_weights: bool = False,
        num_sequences: int = 8,
        draft_model: str | os.PathLike[str] | None = None,
        draft_aux: Sequence[int] | None = None,
        draft_bits: Literal[8, 4, 16] = 8,
        draft_vocab: int | None = None,
        draft: Literal["auto", "off", "ngram", "model"] = "auto",
        restarts: int = 3,
    ) -> None:
        """Check the options; nothing is started.

        Raises:
            RequestError, HostfileError: an option is of the wrong type, out of range, or contradicts another.
        """
        arguments = {name: _struct_value(value) for name, value in locals().items() if name != "self"}
        try:
            # each struct takes the arguments of its own fields
            self._options = convert(arguments, ClusterOptions)
            self._run_options = convert(arguments, _RunOptions)
        except JsonError as error:
            raise RequestError(str(error)) from None
        self._stack = ExitStack()
        self._restarting: RestartingDeployment | None = None
        self._is_start_cancelled = threading.Event()
        self._engine: Engine | None = None

    def _open(self) -> None:
        """Start the stages and load the model.

        Raises:
            SetupError: the options, the hosts or the model cannot be used.
            ClusterError: a stage failed while it started, or the cluster is open already.
        """
        if self._engine is not None:
            raise ClusterError("the cluster is open already: close it first, or make another one")
        request = deployment_request(self._options, self._run_options.num_sequences, self._run_options.draft)
        for line in request.hostfile.warnings:
            _LOG.warning("%s", line)
        request, model = open_source(request)
        if model is not None:  # else only the first host, which is another machine, has the model
            preview(request, model)  # raises SetupError before any stage is started
        with ExitStack() as stack:
            stack.callback(template_process().close)  # other clusters of this program start it again
            self._restarting = RestartingDeployment(request, model, _Listener(), self._run_options.restarts)
            if self._is_start_cancelled.is_set():
                self._restarting.cancel()
            stack.enter_context(self._restarting)
            deployment = self._restarting.deployment
            engine = engine_on(
                deployment,
                draft_mode=self._run_options.draft,
                restarts=self._restarting,
                on_restart=_log_restart,
                max_queued=max(MAX_QUEUED, 4 * self._run_options.num_sequences),
            )
            self._engine = stack.enter_context(engine)
            self._frontend = ModelFrontend(deployment.model, deployment.shape.context_tokens)
            self._stack = stack.pop_all()

    def _close(self) -> None:
        self._engine = None
        self._stack.close()

    def _running_engine(self) -> Engine:
        """Return the engine; raise ClusterError if the cluster is not open."""
        if self._engine is None:
            raise ClusterError("the cluster is not open: use it as a context, in a with block")
        return self._engine

    def _submission(self, prompt: Prompt, sampling: Sampling, tools: ToolDeclarations) -> tuple[Submission, int]:
        """Return the request for a reply, and the number of tool calls in ``prompt``. Long prompts take seconds."""
        self._running_engine()  # raises ClusterError if the cluster is not open
        _require_type("prompt", prompt, isinstance(prompt, Sequence), "a text, or a list of messages")
        _require_type("sampling", sampling, isinstance(sampling, Sampling), "a Sampling")
        is_list = isinstance(tools, Sequence) and not isinstance(tools, str)
        _require_type("tools", tools, is_list, "a list of declarations")
        if isinstance(prompt, str):
            if not prompt.strip():
                raise RequestError("the prompt is empty: give some text")
            messages = [Message(role="user", content=prompt)]
        else:
            messages = read_history(prompt, self._frontend.template.fields, normal_call_ids=True).messages
        if sampling.num_answers > 1:
            raise RequestError(
                f"{sampling.num_answers} answers were requested, but this call returns one: "
                "repeat the prompt in the list for generate"
            )
        settings = reply_settings(sampling, self._frontend, tools)
        for line in settings.warnings:
            _LOG.warning("%s", line)
        prompt_ids = encode_prompt(self._frontend, messages, sampling, tools)
        return submissions_for(settings, self._frontend, prompt_ids)[0], num_calls(messages)


class Cluster(_Cluster):
    """A cluster that answers prompts, and a context manager in which the model is loaded.

    Without a hostfile all stages run on this machine. Without a model the small built-in model is loaded. At most
    ``num_sequences`` replies are sampled at once; further ones wait. After a fault all stages start again, up to
    ``restarts`` times in a row, and replies continue. All methods may be called on any thread.
    """

    def __enter__(self) -> "Cluster":
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all requests, and end all processes of the cluster, on every host."""
        self._close()

    def stream(self, prompt: Prompt, sampling: Sampling = _DEFAULTS, tools: ToolDeclarations = ()) -> Stream:
        """Return the reply to a prompt as it is sampled.

        Raises:
            RequestError, TokenizerError: the prompt or an option is invalid, or the prompt is too long.
            EngineBusy: too many requests wait.
            ClusterError: the stages failed and are not restarted, or the cluster is closed.
        """
        submission, num_calls_before = self._submission(prompt, sampling, tools)
        handle = self._running_engine().submit(submission.request, submission.policy)
        return Stream(handle, num_calls_before)

    def chat(self, prompt: Prompt, sampling: Sampling = _DEFAULTS, tools: ToolDeclarations = ()) -> Completion:
        """Return the complete reply to a prompt. Raise the errors of ``stream`` and ``Stream``."""
        return self.stream(prompt, sampling, tools).completion()

    def generate(
        self, prompts: Iterable[Prompt], sampling: Sampling = _DEFAULTS, tools: ToolDeclarations = ()
    ) -> list[Completion]:
        """Return the replies to many prompts, in their order. At most ``num_sequences`` run at once.

        Raises:
            RequestFailed: a request failed; the others are cancelled. Other errors are those of ``chat``.
        """
        _check_prompts(prompts)
        num_calls_before: dict[int, int] = {}

        def submissions_by_index() -> Iterator[tuple[int, Submission]]:
            for index, prompt in enumerate(prompts):
                submission, num_calls_before[index] = self._submission(prompt, sampling, tools)
                yield index, submission

        completions: dict[int, Completion] = {}
        for result in answer_all(self._running_engine(), submissions_by_index()):
            if result.summary is None:
                raise RequestFailed(f"prompt {result.key}: {result.error}")
            completions[result.key] = completion_of(result.reply, result.summary, num_calls_before[result.key])
        return [completions[index] for index in sorted(completions)]


class AsyncStream(AsyncIterator[Reasoning | Content]):
    """The text of a reply in parts, for ``async for``. Cancelling the task that reads it cancels the request.

    The first read submits the request, and raises the errors of ``Cluster.stream``. Later reads raise those of
    ``Stream``.
    """

    def __init__(self, parts: AsyncGenerator[Reasoning | Content, None], reply: _Reply) -> None:
        self._parts = parts
        self._reply = reply

    async def __anext__(self) -> Reasoning | Content:
        return await anext(self._parts)

    async def close(self) -> None:
        """Cancel the request, unless the reply is complete."""
        await self._parts.aclose()

    async def completion(self) -> Completion:
        """Read the stream to its end and return the complete reply."""
        async for _ in self._parts:
            pass
        return self._reply.completion


class AsyncCluster(_Cluster):
    """A ``Cluster`` for programs with asyncio: ``async with``, in one event loop."""

    async def __aenter__(self) -> "AsyncCluster":
        self._is_start_cancelled.clear()
        try:
            await _run_in_thread(self._open, on_cancel=self._cancel_start)
        except asyncio.CancelledError:
            await _run_in_thread(self._close)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel all requests, and end all processes of the cluster, on every host."""
        await _run_in_thread(self._close)

    def stream(self, prompt: Prompt, sampling: Sampling = _DEFAULTS, tools: ToolDeclarations = ()) -> AsyncStream:
        """Return the reply to a prompt as it is sampled."""
        reply = _Reply()
        return AsyncStream(self._read(reply, prompt, sampling, tools), reply)

    async def chat(self, prompt: Prompt, sampling: Sampling = _DEFAULTS, tools: ToolDeclarations = ()) -> Completion:
        """Return the complete reply to a prompt. Raise the errors of ``Cluster.chat``."""
        return await self.stream(prompt, sampling, tools).completion()

    async def generate(
        self, prompts: Iterable[Prompt], sampling: Sampling = _DEFAULTS, tools: ToolDeclarations = ()
    ) -> list[Completion]:
        """Return the replies to many prompts, in their order. The first error cancels the others."""
        _check_prompts(prompts)
        # two requests for each slot: one runs, the other is ready when it ends
        limit = asyncio.Semaphore(2 * self._running_engine().num_slots)

        async def answer(prompt: Prompt) -> Completion:
            async with limit:
                return await self.chat(prompt, sampling, tools)

        tasks = [asyncio.ensure_future(answer(prompt)) for prompt in prompts]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(
        self, reply: _Reply, prompt: Prompt, sampling: Sampling, tools: ToolDeclarations
    ) -> AsyncGenerator[Reasoning | Content, None]:
        submission, reply.num_calls_before = await asyncio.to_thread(self._submission, prompt, sampling, tools)
        loop = asyncio.get_running_loop()
        unread_events: asyncio.Queue[None] = asyncio.Queue()  # has an item for each unread event of the handle

        def notify(_: Handle) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(unread_events.put_nowait, None)

        handle = self._running_engine().submit(submission.request, submission.policy, notify)
        events = handle.events()
        try:
            while not reply.is_complete:
                await unread_events.get()
                for part in reply.add(next(events)):
                    yield part
        finally:
            handle.cancel()

    def _cancel_start(self) -> None:
        self._is_start_cancelled.set()
        if self._restarting is not None:
            self._restarting.cancel()


async def _run_in_thread(function: Callable[[], None], on_cancel: Callable[[], None] = lambda: None) -> None:
    """Call ``function`` on a thread and wait until it returns. If this task is cancelled meanwhile, call ``on_cancel``.

    Raises:
        CancelledError: this task was cancelled; an error of ``function`` is dropped.
    """
    future = asyncio.get_running_loop().run_in_executor(None, function)
    is_cancelled = False
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            is_cancelled = True
            on_cancel()
    if is_cancelled:
        future.exception()  # marks it as retrieved, else asyncio logs it
        raise asyncio.CancelledError
    future.result()


def _struct_value(value: object) -> object:
    """Return an argument in the type of its struct's field: a path as text, a sequence as a tuple."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _require_type(name: str, value: object, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise RequestError(f"{name} is of type {type(value).__name__}: give {expected}")


def _check_prompts(prompts: Iterable[Prompt]) -> None:
    if isinstance(prompts, str):  # else each letter would be a prompt
        raise RequestError("one prompt was given: give a list of prompts, or use chat")
    is_valid = isinstance(prompts, Iterable) and not isinstance(prompts, Mapping)  # else each key would be a prompt
    _require_type("prompts", prompts, is_valid, "a list of prompts")


def _log_restart(restart: Restart, phase: str) -> None:
    if phase == WAITING:
        _LOG.warning("%s; all stages start again (%d of at most %d)", restart.reason, restart.number, restart.limit)
