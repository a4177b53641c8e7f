"""`mlx-k2 generate`: one prompt in, its answer streamed to stdout."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import click

from mlx_k2.chat.chat_events import Event
from mlx_k2.chat.chat_session import ChatSession, Toolkit
from mlx_k2.chat.reply_source import ReplySource
from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.connect import connect_option, remote_engine
from mlx_k2.cli.console import ConsoleListener, log, show_dry_run
from mlx_k2.cli.generate_file import WANTED_SLOTS, check_options, generate_many
from mlx_k2.cli.option_values import (
    deployment_request,
    is_raw,
    log_settings,
    new_conversation,
    open_source,
    opening_lines,
    prompt_text,
    read_prompt,
    reply_settings,
)
from mlx_k2.cli.options import (
    cluster_options,
    draft_option,
    log_options,
    restarts_option,
    sampling_options,
    timeout_option,
    tool_options,
)
from mlx_k2.cli.output import JsonOutput, TextOutput
from mlx_k2.cli.repl.keyboard import LineKeyboard
from mlx_k2.cli.repl.tool_approval import ToolApproval
from mlx_k2.cli.toolkit import opened_tools
from mlx_k2.coordinator.answer_summary import total
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.coordinator.handle import Finished
from mlx_k2.coordinator.reply_policy import ReplyPolicy
from mlx_k2.deployment.deployment_request import DeploymentRequest
from mlx_k2.deployment.dry_run import preview
from mlx_k2.deployment.restarting import RestartingDeployment
from mlx_k2.errors import CheckpointError
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_frontend import ModelFrontend


@click.command()
@click.argument("prompt", required=False)
@cluster_options
@connect_option
@click.option("--system", metavar="TEXT", help="The system prompt.  [default: the model's own]")
@click.option("--raw", is_flag=True, help="Send PROMPT as it is, without the chat template.")
@click.option("--token-ids", metavar="N,N,...", help="The prompt as token ids, as they are.")
@sampling_options
@timeout_option
@click.option("--prompts", "prompts_path", metavar="FILE", help="Many prompts: a JSON object a line; see the manual.")
@click.option("--out", "out_path", metavar="FILE", help="With --prompts: where the results go, in the same order.")
@draft_option
@restarts_option
@log_options
@tool_options
@click.option(
    "--logprobs", "num_logprobs", type=int, metavar="N", help="With --json: log-probabilities, and of the top N tokens."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: each token, then a summary.")
@click.option("--dry-run", is_flag=True, help="Show hosts, layers, bytes and files; start nothing.")
def command(**options: Any) -> None:
    """Answer PROMPT, or what stands on standard input.

    \b
    On this machine, with the small built-in model on two stages:
        mlx-k2 generate "Hello"

    \b
    On two Macs, each of which loads its share of the layers:
        mlx-k2 generate --hostfile two-macs.json --model ~/Kimi-K2-Thinking "Hello"

    \b
    What would run where, without starting anything:
        mlx-k2 generate --hostfile two-macs.json --model ~/Kimi-K2-Thinking --dry-run

    The answer goes to stdout as it is sampled, everything else to stderr: thinking, tool calls, what it took. The exit
    code is 2 when something was wrong before anything was started, 1 when it went wrong later, 130 after Ctrl-C.
    """  # noqa: D301  # click reads the escape
    if options["num_logprobs"] is not None and not options["as_json"]:
        raise click.UsageError("--logprobs shows in the JSON lines only: add --json")
    check_options(options)
    if options["connect"] is not None:
        _generate_on_server(options)
        return
    request = deployment_request(options)
    if options["prompts_path"] is not None:
        request = replace(request, num_slots=WANTED_SLOTS)
    for line in request.hostfile.warnings:
        log(line)
    request, model = open_source(request)
    if options["dry_run"]:
        _dry_run(request, model)
    elif options["prompts_path"] is not None:
        generate_many(options, request, model)
    else:
        _generate(options, request, model)


def _dry_run(request: DeploymentRequest, model: ModelDescription | None) -> None:
    if model is None:
        name = request.source.path_or_repo
        raise CheckpointError(f"{name} is not on this machine: give --model a folder here, or a repository on the Hub")
    show_dry_run(model, *preview(request, model))


def _generate(options: dict[str, Any], request: DeploymentRequest, model: ModelDescription | None) -> None:
    text = prompt_text(options)
    if model is not None:  # refuse a bad request before any stage is started
        shape, _ = preview(request, model)
        read_prompt(options, text, ModelFrontend(model, shape.context_tokens))
    with (
        opened_tools(options) as tools,
        ConsoleListener(options["verbose"]) as listener,
        RestartingDeployment(request, model, listener, options["restarts"], *log_settings(options)) as restarting,
    ):
        listener.hide_progress()
        _answer(restarting, text, tools, options)


def _generate_on_server(options: dict[str, Any]) -> None:
    """Answer with the model of a running server."""
    if options["dry_run"] or options["prompts_path"] is not None:
        raise click.UsageError("--dry-run and --prompts start stages: leave them out with --connect")
    text, engine = prompt_text(options), remote_engine(options["connect"])
    frontend = engine.frontend
    read_prompt(options, text, frontend)
    with opened_tools(options) as tools, _output(options, frontend.tokenizer) as output:
        output.screen.wait("reading the prompt")
        summaries = output.show(_events(engine, frontend, text, tools, output, options))
        output.summary(total(summaries), None, ())


def _answer(restarting: RestartingDeployment, text: str, tools: Tools | None, options: dict[str, Any]) -> None:
    deployment = restarting.deployment
    frontend = ModelFrontend(deployment.model, deployment.shape.context_tokens)
    for line in opening_lines(options, frontend):
        log(line)
    with (
        _output(options, frontend.tokenizer) as output,
        engine_on(
            deployment, drafts=options["draft"] == "ngram", on_report=restarting.on_report, restarts=restarting
        ) as engine,
    ):
        output.screen.wait("reading the prompt")
        summaries = output.show(_events(engine, frontend, text, tools, output, options))
        output.summary(total(summaries), restarting.deployment, engine.use)


def _output(options: dict[str, Any], tokenizer: Tokenizer) -> TextOutput | JsonOutput:
    if options["as_json"]:
        return JsonOutput(tokenizer)
    return TextOutput(is_raw=is_raw(options), show_thinking=not options["hide_thinking"])


def _events(
    engine: ReplySource,
    frontend: ModelFrontend,
    text: str,
    tools: Tools | None,
    output: TextOutput | JsonOutput,
    options: dict[str, Any],
) -> Iterator[Event]:
    """Return the events of the answer to a raw prompt, or to the first message of a conversation."""
    if is_raw(options):
        return _raw_events(engine, frontend, text, options)
    settings = reply_settings(options, frontend)
    conversation = new_conversation(options, frontend, () if tools is None else tools.declarations)
    toolkit = None
    if tools is not None:
        approval = ToolApproval(output.screen, LineKeyboard(), options["allowed_tools"], everything=options["yes"])
        toolkit = Toolkit(tools, approval)
    return ChatSession(engine, frontend.tokenizer, conversation, settings, toolkit).send_message(text)


def _raw_events(engine: ReplySource, frontend: ModelFrontend, text: str, options: dict[str, Any]) -> Iterator[Event]:
    request = read_prompt(options, text, frontend)
    for event in engine.submit(request, ReplyPolicy(frontend.tokenizer, request)).events():
        yield event.summary if isinstance(event, Finished) else event
