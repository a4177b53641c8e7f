"""`mlx-k2 chat`: a conversation in the terminal, with thinking and tools."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from mlx_k2 import __version__
from mlx_k2.chat.chat_session import ChatSession
from mlx_k2.chat.next_prompt import ReplySource
from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.connect import connect_option, remote_engine
from mlx_k2.cli.console import opening_lines, show_stage_use
from mlx_k2.cli.conversation_options import ConversationOptions
from mlx_k2.cli.option_values import with_struct
from mlx_k2.cli.options import (
    RunOptions,
    cluster_options,
    draft_option,
    run_options,
    sampling_options,
    tool_options,
)
from mlx_k2.cli.program_command import ProgramCommand
from mlx_k2.cli.repl.commands import HELP, OTHER_NAMES, Commands
from mlx_k2.cli.repl.keyboard import choose_keyboard, without_echo
from mlx_k2.cli.repl.loop import Repl
from mlx_k2.cli.repl.screen import Screen, choose_screen
from mlx_k2.cli.repl.tool_approval import ToolApproval
from mlx_k2.cli.repl.transcript import Transcript
from mlx_k2.cli.repl.usage_totals import UsageTotals
from mlx_k2.cli.started_cluster import StartedCluster, frontend_before_start, prepare_request, started_cluster
from mlx_k2.cli.started_tools import started_tools
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest, open_source
from mlx_k2.deployment.restarting import WAITING, Restart
from mlx_k2.errors import MlxK2Error, RequestError
from mlx_k2.private_files import state_folder
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.weights.model_frontend import ModelFrontend

REQUESTED_SLOTS = 2
"""One slot for the answer, and one for the prefill of the next prompt: /retry needs the answer's prompt again."""


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mlx-k2 chat`."""

    cluster: ClusterOptions
    conversation: ConversationOptions
    run: RunOptions
    connect: str | None
    draft_mode: DraftMode
    message: str | None
    prompt_text: str | None
    transcript_path: str | None
    hide_thinking: bool
    verbose: bool

    def __post_init__(self) -> None:
        """Refuse two first messages."""
        if self.message is not None and self.prompt_text is not None:
            raise click.UsageError("MESSAGE and --prompt are the same: give one of them")

    @property
    def first_message(self) -> str | None:
        """The message that is sent before any line is read; None for none."""
        return self.prompt_text if self.message is None else self.message


@click.command(cls=ProgramCommand)
@click.argument("message", required=False)
@click.option("--prompt", "-p", "prompt_text", metavar="TEXT", help="The same as MESSAGE.")
@cluster_options
@connect_option
@sampling_options
@tool_options
@draft_option
@run_options
@click.option("--transcript", "transcript_path", metavar="FILE", help="Append messages and tool calls, as JSON lines.")
@with_struct(ChatOptions)
def command(options: ChatOptions) -> None:
    """Chat in the terminal. MESSAGE, if given, is sent first.

    \b
    With the small built-in model:
        mlx-k2 chat

    \b
    With Kimi K2 Thinking on two Macs, and tools:
        mlx-k2 chat --hostfile two-macs.json --model ~/Kimi-K2-Thinking --mcp mcp.json

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the chat. If standard input or output is not a
    terminal, each line of input is a message or a command; answers go to stdout, everything else to stderr. The exit
    code is 1 if a line has failed and standard input is not a terminal.
    """  # noqa: D301  # click reads the escape
    if sys.stdin is None:
        raise RequestError("there is no standard input: redirect it from a file with a message a line")
    with without_echo():
        _start_chat(options)


def _start_chat(options: ChatOptions) -> None:
    """Start stages, or connect to a server, and chat with the model."""
    if options.connect is not None:
        with _chat_resources(options) as resources:
            _chat_on_server(options, resources)
        return
    request, model = open_source(prepare_request(options.cluster, options.draft_mode, REQUESTED_SLOTS))
    frontend = frontend_before_start(request, model)
    if frontend is not None:
        _check_shortest_request(options, frontend)
    with _chat_resources(options) as resources:
        if frontend is not None:
            options.conversation.settings(frontend, resources.tools)  # raises RequestError before a stage is started
        with started_cluster(request, model, options.run, verbose=options.verbose) as cluster:
            _chat_on_stages(options, request, cluster, resources)


class _ChatResources(NamedTuple):
    """The screen, the started tools and the open transcript of a chat."""

    screen: Screen
    tools: Tools | None
    transcript: Transcript | None


@contextmanager
def _chat_resources(options: ChatOptions) -> Iterator[_ChatResources]:
    """Open the transcript and start the tools; close them on exit."""
    with ExitStack() as stack:
        screen = choose_screen(show_thinking=not options.hide_thinking)
        transcript = None
        if options.transcript_path is not None:
            transcript = stack.enter_context(Transcript(Path(options.transcript_path), screen.log))
        yield _ChatResources(screen, stack.enter_context(started_tools(options.conversation.tools)), transcript)


def _check_shortest_request(options: ChatOptions, frontend: ModelFrontend) -> None:
    """Raise RequestError or TokenizerError if even a message of one letter cannot be answered with these options."""
    conversation = options.conversation.begin(frontend, None)
    conversation.add_user("a")
    options.conversation.settings(frontend).request(frontend.tokenizer, conversation.prompt_ids())


def _chat_on_stages(
    options: ChatOptions, request: DeploymentRequest, cluster: StartedCluster, resources: _ChatResources
) -> None:
    """Chat with the model on started stages."""
    stages, frontend = cluster
    screen = resources.screen

    def show_idle_restart(restart: Restart, phase: str) -> None:
        if phase == WAITING and not screen.is_answering:  # an answer shows its restarts itself
            screen.show_restart(restart)

    def show_idle_failure(error: MlxK2Error) -> None:
        if not screen.is_answering:
            screen.log(f"error: {error}; the next message ends the chat, and the conversation is kept")

    def show_stats() -> None:
        show_stage_use(stages.deployment, engine.use)

    with engine_on(
        stages.deployment,
        draft_mode=options.draft_mode,
        on_report=stages.on_report,
        restarts=stages,
        on_restart=show_idle_restart,
        on_failure=show_idle_failure,
    ) as engine:
        for line in opening_lines(options.cluster, frontend):
            screen.log(line)
        usage = UsageTotals(frontend.context_tokens, len(stages.deployment.plans))
        _run_chat(options, engine, frontend, request.source.path_or_repo, resources, usage, show_stats)


def _chat_on_server(options: ChatOptions, resources: _ChatResources) -> None:
    """Chat with the model of a running server."""
    assert options.connect is not None
    url, options = options.connect, msgspec.structs.replace(options, conversation=options.conversation.for_server())
    engine = remote_engine(url)

    def show_stats() -> None:
        resources.screen.log(f"the stages are those of the server {url}")

    usage = UsageTotals(engine.frontend.context_tokens, num_stages=None)
    _run_chat(options, engine, engine.frontend, engine.model_name, resources, usage, show_stats)


def _run_chat(
    options: ChatOptions,
    source: ReplySource,
    frontend: ModelFrontend,
    model_name: str,
    resources: _ChatResources,
    usage: UsageTotals,
    show_stats: Callable[[], None],
) -> None:
    """Run a conversation with the model of ``source`` until the user ends it. After an error, save the conversation."""
    screen, tools, transcript = resources
    conversation = options.conversation.begin(frontend, tools)
    usage.context_used = len(conversation.next_prompt_prefix())
    keyboard = choose_keyboard([*HELP, *OTHER_NAMES], usage.status_line)
    tool_options = options.conversation.tools
    approval = ToolApproval(screen, keyboard, tool_options.allowed_tools, allows_all=tool_options.yes)
    settings = options.conversation.settings(frontend, tools)
    session = approval.session = ChatSession(source, frontend.tokenizer, conversation, settings, tools, approval)

    def temperature(thinking: bool) -> float:
        sampling = msgspec.structs.replace(options.conversation.sampling, thinking=thinking)
        return sampling.sampler_parameters(frontend.recommended).temperature

    digest = frontend.model.digest
    commands = Commands(session, model_name, digest, screen, usage, tools, approval, show_stats, temperature)
    if transcript is not None:
        transcript.write({"started": {"mlx-k2": __version__, "model": model_name, "digest": digest}})
    for line in settings.warnings:
        screen.log(line)
    hint = (
        "/help lists the commands, Ctrl-D leaves"
        if keyboard.can_ask
        else "each line of input is a message or a command"
    )
    screen.log(f"{model_name} · {hint}")
    repl = Repl(commands, keyboard, transcript)
    try:
        repl.run(options.first_message)
    except BaseException:  # also a signal, a full disk, or a defect of the program
        if conversation.messages:
            with suppress(OSError):  # the terminal may be closed
                _save_after_error(commands, screen)
        raise
    if repl.has_failed and not keyboard.can_ask:
        raise click.exceptions.Exit(1)  # a script does not read the message


def _save_after_error(commands: Commands, screen: Screen) -> None:
    """Save the conversation to a file that /load reads, and log its path."""
    folder = state_folder() or Path(tempfile.gettempdir())
    path = folder / f"chat-{time.strftime('%Y%m%d-%H%M%S')}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        commands.save_to(path)
    except (OSError, RequestError) as error:
        screen.log(f"the conversation could not be saved: {error}")
    else:
        screen.log(f"the conversation so far is in {path}: /load it to go on")
