"""`mlx-k2 generate --prompts`: a file of prompts in, a file of results out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlx_k2.chat.sampling_options import reply_settings
from mlx_k2.cli.console import ConsoleListener, console, log, log_restart, opening_lines
from mlx_k2.cli.generate_options import GenerateOptions
from mlx_k2.cli.prompt_files import PromptLine, ResultFile, line_seed, read_prompt_lines, run_digest
from mlx_k2.coordinator.batch_results import BatchResult, answer_all
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.deployment.deployment_request import DeploymentRequest
from mlx_k2.deployment.restarting import RestartingDeployment
from mlx_k2.errors import SetupError
from mlx_k2.scheduling.request import Request
from mlx_k2.text.chat_template import ChatTemplate
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.message import Message
from mlx_k2.text.prompt import render_prompt
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_frontend import ModelFrontend

WANTED_SLOTS = 16
"""Concurrent sequences if memory permits. With K2's bytes, more gain little throughput and wait longer (computed)."""


def generate_many(options: GenerateOptions, asked: DeploymentRequest, model: ModelDescription | None) -> None:
    """Answer every line that has no result yet.

    Raises:
        RequestError: a file is malformed or belongs to another run. No file is changed, and no stage is started unless
            only the first host has the model.
    """
    assert options.prompts_path is not None, "GenerateOptions has both files"
    assert options.out_path is not None, "GenerateOptions has both files"
    lines = read_prompt_lines(Path(options.prompts_path))
    if model is not None:
        _results(options, Path(options.out_path), lines, model)
    with (
        ConsoleListener(options.verbose) as listener,
        RestartingDeployment(asked, model, listener, *options.run.arguments) as restarting,
        _results(options, Path(options.out_path), lines, restarting.deployment.model) as results,
    ):
        listener.done()
        num_failed = _answer_lines(options, restarting, lines, results)
    failed = f", {num_failed} of them failed" if num_failed else ""
    log(f"{len(lines)} results are in {options.out_path}{failed}")


def _results(options: GenerateOptions, path: Path, lines: Sequence[PromptLine], model: ModelDescription) -> ResultFile:
    asked, conversation = options.cluster, options.conversation
    counted = (
        conversation.system,
        options.raw,
        conversation.sampling,
        asked.dense_bits,
        asked.dtype,
        asked.context_tokens,
    )
    return ResultFile(path, [run_digest(model.digest, counted, line) for line in lines])


def _answer_lines(
    options: GenerateOptions, restarting: RestartingDeployment, lines: Sequence[PromptLine], results: ResultFile
) -> int:
    """Run the prompts without a result; return the number that failed in this run."""
    prompts: dict[int, Request] = {}
    num_done, seed = results.num_done, options.conversation.sampling.base_seed
    frontend = ModelFrontend(restarting.deployment.model, restarting.deployment.shape.context_tokens)
    for text in opening_lines(options.cluster, frontend):
        log(text)
    with _progress(len(lines), num_done) as progress:
        (task,) = progress.task_ids
        for index, line in enumerate(lines[num_done:], start=num_done):
            try:
                request = line_request(options, line, line_seed(seed, index), frontend)
            except SetupError as error:
                results.write(index, {"id": _id(line, index), "error": str(error)})
                progress.advance(task)
            else:
                prompts[index] = request
        index_of = {id(request): index for index, request in prompts.items()}
        num_failed = len(lines) - num_done - len(prompts)
        with engine_on(
            restarting.deployment,
            drafts=options.drafts,
            prompts_first=True,
            on_report=restarting.on_report,
            restarts=restarting,
            on_restart=log_restart,
        ) as engine:
            for answer in answer_all(engine, frontend.tokenizer, list(prompts.values())):
                index = index_of[id(answer.request)]
                result = {**_result(answer.request, answer), **_left_out(lines[index], frontend)}
                results.write(index, {"id": _id(lines[index], index), **result})
                progress.advance(task)
                num_failed += answer.error is not None
    return num_failed


def line_request(options: GenerateOptions, line: PromptLine, seed: int, frontend: ModelFrontend) -> Request:
    """Return the request for one line. Values in the line override the options and ``seed``.

    Raises:
        RequestError, TokenizerError: it cannot be served; gives the reason.
    """
    base = msgspec.structs.replace(options.conversation.sampling, seed=seed)
    sampling = base.overridden_by(line)
    if options.raw and line.prompt is not None:
        prompt_ids = frontend.tokenizer.encode_text(line.prompt)
    else:
        template = frontend.template
        messages = _messages(options, line, template)
        variables = sampling.mode.variables(template)
        prompt_ids = render_prompt(template, frontend.tokenizer, messages, line.tools, **variables)
    return reply_settings(sampling, frontend).request(frontend.tokenizer, prompt_ids)


def _messages(options: GenerateOptions, line: PromptLine, template: ChatTemplate) -> list[Message]:
    if line.messages is not None:
        return read_history(line.messages, template.fields).messages
    assert line.prompt is not None, "a line without a prompt"
    system = options.conversation.system
    before = [] if system is None else [Message(role="system", content=system)]
    return [*before, Message(role="user", content=line.prompt)]


def _progress(total: int, completed: int) -> Progress:
    """Return a progress bar on stderr, disabled if that is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    progress.add_task("prompts", total=total, completed=completed)
    return progress


def _id(line: PromptLine, index: int) -> str | int:
    """Return the line's own id, else its number, counted from 1."""
    return index + 1 if line.id is None else line.id


def _left_out(line: PromptLine, frontend: ModelFrontend) -> dict[str, Any]:
    """Return ``{"left_out": [...]}`` if the prompt does not hold all fields of the line's messages, else {}."""
    left_out = read_history(line.messages, frontend.template.fields).left_out if line.messages else ()
    return {"left_out": left_out} if left_out else {}


def _result(request: Request, answer: BatchResult) -> dict[str, Any]:
    if answer.error is not None:
        return {"error": answer.error}
    result: dict[str, Any] = {
        "text": answer.reply.content,
        "reasoning": answer.reply.reasoning,
        "tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason.value,
        "prompt_tokens": len(request.prompt_ids),
        "seed": request.sampling.seed,
        "first_token_s": None if answer.first_token_s is None else round(answer.first_token_s, 3),
        "finished_s": round(answer.finished_s, 3),
    }
    if answer.reply.calls:
        result["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in answer.reply.calls]
    return result
