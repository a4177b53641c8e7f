"""Conversion of options to requests: hosts and model of a deployment, prompt and settings of a reply. Shows nothing."""

import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_k2.builtin import BANNER
from mlx_k2.chat.chat_session import ReplySettings
from mlx_k2.chat.conversation import Conversation
from mlx_k2.cli.prompt_files import PromptLine
from mlx_k2.cluster.hostfile import Hostfile, local_hostfile, read_hostfile
from mlx_k2.cluster.partition import parse_split
from mlx_k2.deployment.deployment_request import DeploymentRequest
from mlx_k2.errors import DownloadError, HostfileError, RequestError
from mlx_k2.sampling import GenerationConfig, Sampling
from mlx_k2.scheduling.request import Request
from mlx_k2.text.prompt import render_prompt
from mlx_k2.text.thinking_mode import INSTANT_TEMPERATURE, ThinkingMode
from mlx_k2.weights.checkpoint import ModelDescription, describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_frontend import ModelFrontend
from mlx_k2.weights.model_source import BUILTIN, ModelSource, is_repo, model_folder

SAMPLING_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_FOR_REPLIES = ("tools_path", "mcp_path", "thinking_budget", "thinking")
_MIN_LEASE_S, _MAX_LEASE_S = 2, 3600
_MAX_DIGITS = 10


def deployment_request(options: Mapping[str, Any]) -> DeploymentRequest:
    """Return the request for a deployment: its hosts, its model and their settings.

    Raises:
        HostfileError, PartitionError, RequestError: an option cannot be used.
    """
    if not _MIN_LEASE_S <= options["lease_s"] <= _MAX_LEASE_S:  # false for nan, too
        raise RequestError(f"--lease {options['lease_s']:g} is out of range: give {_MIN_LEASE_S} to {_MAX_LEASE_S} s")
    return DeploymentRequest(
        hostfile=_hostfile(options),
        source=_source(options["model"], options["revision"]),
        split=None if options["split"] is None else parse_split(options["split"]),
        context_tokens=options["context_tokens"],
        dtype=options["dtype"],
        lease_s=options["lease_s"],
        stall_timeout_s=options["stall_timeout_s"],
        dense_bits=options["dense_bits"],
        check_weights=options["check_weights"],
    )


def log_settings(options: Mapping[str, Any]) -> tuple[Path | None, bool]:
    """Return the log folder, None without --log-dir, and whether to log token ids."""
    return None if options["log_dir"] is None else Path(options["log_dir"]), options["log_tokens"]


def _hostfile(options: Mapping[str, Any]) -> Hostfile:
    if options["hostfile"] is not None:
        if options["num_stages"] is not None:
            raise HostfileError("--stages is for runs on this machine alone: leave it out, or leave out --hostfile")
        return read_hostfile(Path(options["hostfile"]))
    default = 2 if options["model"] is None else 1
    return local_hostfile(options["num_stages"] or default)


def _source(model: str | None, revision: str | None) -> ModelSource:
    """Return the model source. The path of a local folder is absolute, since a stage starts in another folder."""
    source = ModelSource(path_or_repo=BUILTIN if model is None else model, revision=revision)
    if revision is not None and not is_repo(source):
        raise RequestError("--revision is for a repository on the Hub: leave it out, or give one as --model owner/name")
    folder = model_folder(source)
    if model is None or not folder.is_dir():
        return source
    path = str(folder.resolve())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise RequestError(f"--model: the path {path} is not UTF-8: rename the folder, or give a link to it") from None
    return ModelSource(path_or_repo=path)


def open_source(request: DeploymentRequest) -> tuple[DeploymentRequest, ModelDescription | None]:
    """Return the request and the model's description from its folder or the Hub.

    The description is None if only the first host may have the model. In the returned request the repository's revision
    is pinned, so that every host uses the same one.

    Raises:
        SetupError: the model is not found, or mlx-k2 cannot run it.
    """
    source = request.source
    elsewhere = not request.hostfile.hosts[0].is_local
    if elsewhere and not is_repo(source) and not model_folder(source).is_dir():
        return request, None
    try:
        files, pinned = read_model_files(source)
    except DownloadError:
        if elsewhere:
            return request, None
        raise
    return replace(request, source=pinned), describe_model(files, source.path_or_repo)


def opening_lines(options: Mapping[str, Any], frontend: ModelFrontend) -> tuple[str, ...]:
    """Return lines for the user before the first answer: what the built-in model is, and the template's warnings."""
    banner = BANNER if options["model"] is None else ()
    is_templated = not options.get("raw") and options.get("token_ids") is None
    return (*banner, *(frontend.template.warnings if is_templated else ()))


def is_raw(options: Mapping[str, Any]) -> bool:
    """Return whether the prompt is sent without a chat template, so that its answer is not parsed as a reply."""
    return bool(options["raw"]) or options["token_ids"] is not None


def prompt_text(options: Mapping[str, Any]) -> str:
    """Return PROMPT, else the text of standard input; '' if the prompt is given as token ids.

    Raises:
        RequestError: there is no text, or options contradict each other.
    """
    if is_raw(options) and (options["preserve_thinking"] or any(options[name] is not None for name in _FOR_REPLIES)):
        raise RequestError("--raw and --token-ids go without --tools, --mcp and options for thinking")
    if options["token_ids"] is not None:
        if options["prompt"] or options["system"] is not None:
            raise RequestError("--token-ids is the whole prompt: leave out PROMPT and --system")
        return ""
    if options["raw"] and options["system"] is not None:
        raise RequestError("--raw sends PROMPT alone: leave out --system")
    text: str | None = options["prompt"]
    if text is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise RequestError("there is no prompt: give PROMPT, or write one to standard input")
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"standard input is not UTF-8 text: its byte {error.start} is not") from None
    if not text.strip():
        raise RequestError("the prompt is empty: give some text")
    return text


def read_prompt(options: Mapping[str, Any], text: str, frontend: ModelFrontend) -> Request:
    """Return the request for a prompt, with the options' sampling values, else the checkpoint's recommendations.

    Raises:
        RequestError, TokenizerError: it cannot be served; gives the reason.
    """
    prompt_ids = _prompt_ids(options, text, frontend)
    return reply_settings(options, frontend).request(frontend.tokenizer, prompt_ids)


def line_prompt(options: Mapping[str, Any], line: PromptLine, seed: int, frontend: ModelFrontend) -> Request:
    """Return the request for one line of a file of prompts. Values in the line override the options and ``seed``.

    Raises:
        RequestError, TokenizerError: it cannot be served; gives the reason.
    """
    names = (*SAMPLING_NAMES, "max_tokens", "timeout", "thinking", "preserve_thinking")
    given = {name: value for name in names if (value := getattr(line, name)) is not None}
    merged = {**options, **given, "seed": seed if line.seed is None else line.seed}
    if line.messages is not None:
        prompt_ids = _rendered(merged, line.messages, frontend, line.tools)
    else:
        assert line.prompt is not None, "a line without a prompt"
        prompt_ids = _prompt_ids(merged, line.prompt, frontend, line.tools)
    return reply_settings(merged, frontend).request(frontend.tokenizer, prompt_ids)


def reply_settings(options: Mapping[str, Any], frontend: ModelFrontend) -> ReplySettings:
    """Return the settings of replies: the options', else the checkpoint's recommendations.

    Raises:
        RequestError: a value is out of range.
    """
    recommended = frontend.recommended
    return ReplySettings(
        sampling=_sampling(options, recommended),
        max_tokens=frontend.context_tokens if options["max_tokens"] is None else options["max_tokens"],
        stop_ids=frontend.stop_ids,
        timeout_s=options["timeout"],
        context_tokens=frontend.context_tokens,
        thinking_budget=options["thinking_budget"],
        max_tool_calls=options["max_tool_calls"],
    )


def new_conversation(
    options: Mapping[str, Any], frontend: ModelFrontend, tools: Sequence[Mapping[str, Any]] = ()
) -> Conversation:
    """Return a conversation without messages of the user or the model.

    Raises:
        TokenizerError: the model's chat template cannot be read.
        RequestError: the model cannot think as the options demand.
    """
    return Conversation(frontend.template, frontend.tokenizer, tools, options["system"], thinking_mode(options))


def thinking_mode(options: Mapping[str, Any]) -> ThinkingMode:
    """Return the mode that --thinking and --preserve-thinking select."""
    return ThinkingMode(options["thinking"], options["preserve_thinking"])


def base_seed(options: Mapping[str, Any]) -> int:
    """Return --seed, else a random seed of 32 bits."""
    seed: int | None = options["seed"]
    return secrets.randbits(32) if seed is None else seed


def _sampling(options: Mapping[str, Any], recommended: GenerationConfig) -> Sampling:
    values = {name: getattr(recommended, name) if options[name] is None else options[name] for name in SAMPLING_NAMES}
    if options["temperature"] is None and options["thinking"] is False:
        values["temperature"] = INSTANT_TEMPERATURE
    given = {name: value for name, value in values.items() if value is not None}
    return Sampling(seed=base_seed(options), num_logprobs=options.get("num_logprobs"), **given)


def _prompt_ids(
    options: Mapping[str, Any], text: str, frontend: ModelFrontend, tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    if options["token_ids"] is not None:
        return _parse_ids(options["token_ids"])
    if options["raw"]:
        return frontend.tokenizer.encode_text(text)
    messages = [{"role": "user", "content": text}]
    if options["system"] is not None:
        messages.insert(0, {"role": "system", "content": options["system"]})
    return _rendered(options, messages, frontend, tools)


def _rendered(
    options: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    frontend: ModelFrontend,
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[int]:
    template = frontend.template
    return render_prompt(template, frontend.tokenizer, messages, tools, **thinking_mode(options).variables(template))


def _parse_ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and len(part) < _MAX_DIGITS):
            found = part[:_MAX_DIGITS]
            raise RequestError(f"--token-ids: {found!r} is not a token id: write numbers with commas, as in 3,4,5")
    return [int(part) for part in parts]
