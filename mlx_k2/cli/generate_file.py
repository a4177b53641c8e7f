"""`mlx-k2 generate --prompts`: a file of prompts in, a file of results out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlx_k2.cli.console import ConsoleListener, console, log, log_restart
from mlx_k2.cli.option_values import (
    SAMPLING_NAMES,
    base_seed,
    line_prompt,
    log_settings,
    opening_lines,
)
from mlx_k2.cli.prompt_files import PromptLine, ResultFile, line_seed, read_prompt_lines, run_digest
from mlx_k2.coordinator.batch_results import BatchResult, answer_all
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.deployment.deployment_request import DeploymentRequest
from mlx_k2.deployment.restarting import RestartingDeployment
from mlx_k2.errors import SetupError
from mlx_k2.scheduling.request import Request
from mlx_k2.text.history_reader import read_history
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_frontend import ModelFrontend

WANTED_SLOTS = 16
"""Concurrent sequences if memory permits. With K2's bytes, more gain little throughput and wait longer (computed)."""
_SINGLE = ("prompt", "token_ids", "as_json", "num_logprobs", "tools_path", "mcp_path", "thinking_budget")
_COUNTED = ("system", "raw", "max_tokens", "seed", "dense_bits", "thinking", "preserve_thinking", *SAMPLING_NAMES)
"""The options that change a result; they are part of its digest."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that cannot be combined with a file of prompts."""
    if (options["prompts_path"] is None) != (options["out_path"] is None):
        raise click.UsageError("--prompts and --out go together: give both")
    if options["prompts_path"] is not None and any(options[name] not in (None, False) for name in _SINGLE):
        raise click.UsageError(
            "--prompts goes without PROMPT, --token-ids, --json, --logprobs, --tools, --mcp and --thinking-budget"
        )


def generate_many(options: dict[str, Any], asked: DeploymentRequest, model: ModelDescription | None) -> None:
    """Answer every line that has no result yet.

    Raises:
        RequestError: a file is malformed or belongs to another run. No file is changed, and no stage is started unless
            only the first host has the model.
    """
    lines = read_prompt_lines(Path(options["prompts_path"]))
    if model is not None:
        _results(options, lines, model)
    with (
        ConsoleListener(options["verbose"]) as listener,
        RestartingDeployment(asked, model, listener, options["restarts"], *log_settings(options)) as restarting,
        _results(options, lines, restarting.deployment.model) as results,
    ):
        listener.done()
        num_failed = _answer_lines(options, restarting, lines, results)
    failed = f", {num_failed} of them failed" if num_failed else ""
    log(f"{len(lines)} results are in {options['out_path']}{failed}")


def _results(options: Mapping[str, Any], lines: Sequence[PromptLine], model: ModelDescription) -> ResultFile:
    counted = {name: options[name] for name in _COUNTED}
    return ResultFile(Path(options["out_path"]), [run_digest(model.digest, counted, line) for line in lines])


def _answer_lines(
    options: Mapping[str, Any], restarting: RestartingDeployment, lines: Sequence[PromptLine], results: ResultFile
) -> int:
    """Run the prompts without a result; return the number that failed in this run."""
    prompts: dict[int, Request] = {}
    num_done, seed = results.num_done, base_seed(options)
    frontend = ModelFrontend(restarting.deployment.model, restarting.deployment.shape.context_tokens)
    for text in opening_lines(options, frontend):
        log(text)
    with _progress(len(lines), num_done) as progress:
        (task,) = progress.task_ids
        for index, line in enumerate(lines[num_done:], start=num_done):
            try:
                request = line_prompt(options, line, line_seed(seed, index), frontend)
            except SetupError as error:
                results.write(index, {"id": _id(line, index), "error": str(error)})
                progress.advance(task)
            else:
                prompts[index] = request
        index_of = {id(request): index for index, request in prompts.items()}
        num_failed = len(lines) - num_done - len(prompts)
        with engine_on(
            restarting.deployment,
            drafts=options["draft"] == "ngram",
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
