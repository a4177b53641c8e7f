"""`mlx-k2 chat`: a conversation in the terminal, with thinking and tools."""

import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import click
import msgspec

from mlx_k2 import __version__
from mlx_k2.chat.chat_session import ChatSession, Toolkit
from mlx_k2.chat.sampling_options import SamplingOptions
from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.console import ConsoleListener, log, opening_lines, show_stage_use
from mlx_k2.cli.conversation_options import ConversationOptions
from mlx_k2.cli.options import (
    RunOptions,
    cluster_options,
    draft_option,
    run_options,
    sampling_options,
    tool_options,
    with_struct,
)
from mlx_k2.cli.repl.commands import HELP, Commands, Model
from mlx_k2.cli.repl.loop import Repl
from mlx_k2.cli.repl.screen import Screen
from mlx_k2.cli.repl.terminal import choose_keyboard, choose_screen
from mlx_k2.cli.repl.tool_approval import ToolApproval
from mlx_k2.cli.repl.transcript import Transcript
from mlx_k2.cli.repl.usage_totals import UsageTotals
from mlx_k2.cli.toolkit import opened_tools
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.deployment.cluster_options import ClusterOptions, deployment_request, open_source
from mlx_k2.deployment.deployment_request import DeploymentRequest
from mlx_k2.deployment.dry_run import preview
from mlx_k2.deployment.restarting import WAITING, Restart, RestartingDeployment
from mlx_k2.errors import MlxK2Error, RequestError
from mlx_k2.private_files import state_folder
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_frontend import ModelFrontend

WANTED_SLOTS = 2
"""One slot for the answer and one for the prefill of the next prompt, so that /retry finds its prompt cached too."""


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mlx-k2 chat`."""

    cluster: ClusterOptions
    conversation: ConversationOptions
    run: RunOptions
    drafts: bool
    transcript_path: str | None
    hide_thinking: bool
    verbose: bool


@click.command()
@cluster_options
@click.option("--system", metavar="TEXT", help="The system prompt.  [default: the model's own]")
@sampling_options
@tool_options
@draft_option
@run_options
@click.option("--transcript", "transcript_path", metavar="FILE", help="Append all that is said, as JSON lines.")
@with_struct(ChatOptions)
def command(options: ChatOptions) -> None:
    """Chat in the terminal.

    \b
    With the small built-in model:
        mlx-k2 chat

    \b
    With Kimi K2 Thinking on two Macs, and tools:
        mlx-k2 chat --hostfile two-macs.json --model ~/Kimi-K2-Thinking --mcp mcp.json

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves. Where standard input or output is no terminal,
    each line read is a message; answers go to stdout, everything else to stderr.
    """  # noqa: D301  # click reads the escape
    if sys.stdin is None:
        raise RequestError("there is no standard input: redirect it from a file with a message a line")
    request = deployment_request(options.cluster, WANTED_SLOTS)
    for line in request.hostfile.warnings:
        log(line)
    request, model = open_source(request)
    if model is not None:  # refuse a bad request before any stage is started
        shape, _ = preview(request, model)
        _check(options, model, shape.context_tokens)
    with ExitStack() as stack:
        screen = choose_screen(show_thinking=not options.hide_thinking)
        transcript = None
        if options.transcript_path is not None:
            transcript = stack.enter_context(Transcript(Path(options.transcript_path), screen.log))
        tools = stack.enter_context(opened_tools(options.conversation.tools))
        listener = stack.enter_context(ConsoleListener(options.verbose))
        restarting = stack.enter_context(RestartingDeployment(request, model, listener, *options.run.arguments))
        listener.hide_progress()
        _chat(options, request, restarting, screen, tools, transcript)


def _check(options: ChatOptions, model: ModelDescription, context_tokens: int) -> None:
    frontend = ModelFrontend(model, context_tokens)
    conversation = options.conversation.begin(frontend, None)
    conversation.add_user("a")
    options.conversation.settings(frontend).request(frontend.tokenizer, conversation.prompt_ids())


def _chat(
    options: ChatOptions,
    request: DeploymentRequest,
    restarting: RestartingDeployment,
    screen: Screen,
    tools: Tools | None,
    transcript: Transcript | None,
) -> None:
    deployment = restarting.deployment
    model, context_tokens = deployment.model, deployment.shape.context_tokens
    frontend = ModelFrontend(model, context_tokens)
    tokenizer = frontend.tokenizer
    conversation = options.conversation.begin(frontend, tools)
    usage = UsageTotals(context_tokens, len(deployment.plans), len(conversation.known_ids()))
    name = Model(request.source.path_or_repo, model.digest)
    keyboard = choose_keyboard(list(HELP), usage.status)
    asked = options.conversation.tools
    approval = ToolApproval(screen, keyboard, asked.allowed_tools, everything=asked.yes)
    settings = options.conversation.settings(frontend, tools)
    toolkit = None if tools is None else Toolkit(tools, approval)

    def show_idle_restart(restart: Restart, phase: str) -> None:
        if phase == WAITING and not session.is_answering:  # an answer shows its restarts itself
            screen.restart(restart)

    def show_idle_failure(error: MlxK2Error) -> None:
        if not session.is_answering:
            screen.log(f"error: {error}; the next message ends the chat, and the conversation is kept")

    engine = engine_on(
        deployment,
        drafts=options.drafts,
        on_report=restarting.on_report,
        restarts=restarting,
        on_restart=show_idle_restart,
        on_failure=show_idle_failure,
    )
    session = ChatSession(engine, tokenizer, conversation, settings, toolkit)
    with engine:
        approval.answer = session
        commands = Commands(
            session,
            name,
            screen,
            usage,
            tools,
            approval,
            lambda: show_stage_use(restarting.deployment, engine.use),
            lambda thinking: _temperature(options.conversation.sampling, frontend, thinking),
        )
        if transcript is not None:
            transcript.write({"started": {"mlx-k2": __version__, "model": name.name, "digest": name.digest}})
        for line in opening_lines(options.cluster, frontend):
            screen.log(line)
        screen.log(f"{name.name} · /help lists the commands, Ctrl-D leaves")
        try:
            Repl(session, commands, keyboard, screen, usage, transcript).run()
        except BaseException:  # also a signal, a full disk and our own mistakes
            if session.conversation.messages:
                with suppress(OSError):  # the terminal may be gone
                    _rescue(commands, screen)
            raise


def _temperature(options: SamplingOptions, frontend: ModelFrontend, thinking: bool) -> float:
    return msgspec.structs.replace(options, thinking=thinking).resolved(frontend.recommended).temperature


def _rescue(commands: Commands, screen: Screen) -> None:
    """Save the conversation for /load, after an error."""
    folder = state_folder() or Path(tempfile.gettempdir())
    path = folder / f"chat-{time.strftime('%Y%m%d-%H%M%S')}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        commands.save_to(path)
    except (OSError, RequestError) as error:
        screen.log(f"the conversation could not be kept: {error}")
    else:
        screen.log(f"the conversation so far is in {path}: /load it to go on")
