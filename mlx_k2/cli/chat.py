"""`mlx-k2 chat`: a conversation in the terminal, with thinking and tools."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_k2 import __version__
from mlx_k2.chat.chat_session import ChatSession, Toolkit
from mlx_k2.chat.reply_source import ReplySource
from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.connect import connect_option, remote_engine
from mlx_k2.cli.console import ConsoleListener, log, show_stage_use
from mlx_k2.cli.option_values import (
    deployment_request,
    log_settings,
    new_conversation,
    open_source,
    opening_lines,
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
from mlx_k2.cli.repl.commands import HELP, Commands, Model
from mlx_k2.cli.repl.loop import Repl
from mlx_k2.cli.repl.screen import Screen
from mlx_k2.cli.repl.terminal import choose_keyboard, choose_screen
from mlx_k2.cli.repl.tool_approval import ToolApproval
from mlx_k2.cli.repl.transcript import Transcript
from mlx_k2.cli.repl.usage_totals import UsageTotals
from mlx_k2.cli.toolkit import opened_tools
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.deployment.deployment_request import DeploymentRequest
from mlx_k2.deployment.dry_run import preview
from mlx_k2.deployment.restarting import WAITING, Restart, RestartingDeployment
from mlx_k2.errors import MlxK2Error, RequestError
from mlx_k2.private_files import state_folder
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_frontend import ModelFrontend

WANTED_SLOTS = 2
"""One slot for the answer and one for the prefill of the next prompt, so that /retry finds its prompt cached too."""


@click.command()
@cluster_options
@connect_option
@click.option("--system", metavar="TEXT", help="The system prompt.  [default: the model's own]")
@sampling_options
@timeout_option
@tool_options
@draft_option
@restarts_option
@log_options
@click.option("--transcript", "transcript_path", metavar="FILE", help="Append all that is said, as JSON lines.")
def command(**options: Any) -> None:
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
    if options["connect"] is not None:
        with _opened(options) as (screen, tools, transcript):
            _chat_on_server(options, screen, tools, transcript)
        return
    request = replace(deployment_request(options), num_slots=WANTED_SLOTS)
    for line in request.hostfile.warnings:
        log(line)
    request, model = open_source(request)
    if model is not None:  # refuse a bad request before any stage is started
        shape, _ = preview(request, model)
        _check(options, model, shape.context_tokens)
    kept = log_settings(options)
    with (
        _opened(options) as (screen, tools, transcript),
        ConsoleListener(options["verbose"]) as listener,
        RestartingDeployment(request, model, listener, options["restarts"], *kept) as restarting,
    ):
        listener.hide_progress()
        _chat(options, request, restarting, screen, tools, transcript)


@contextmanager
def _opened(options: dict[str, Any]) -> Iterator[tuple[Screen, Tools | None, Transcript | None]]:
    with ExitStack() as stack:
        screen = choose_screen(show_thinking=not options["hide_thinking"])
        transcript = None
        if options["transcript_path"] is not None:
            transcript = stack.enter_context(Transcript(Path(options["transcript_path"]), screen.log))
        yield screen, stack.enter_context(opened_tools(options)), transcript


def _check(options: dict[str, Any], model: ModelDescription, context_tokens: int) -> None:
    frontend = ModelFrontend(model, context_tokens)
    conversation = new_conversation(options, frontend)
    conversation.add_user("a")
    reply_settings(options, frontend).request(frontend.tokenizer, conversation.prompt_ids())


def _chat(
    options: dict[str, Any],
    request: DeploymentRequest,
    restarting: RestartingDeployment,
    screen: Screen,
    tools: Tools | None,
    transcript: Transcript | None,
) -> None:
    deployment = restarting.deployment
    frontend = ModelFrontend(deployment.model, deployment.shape.context_tokens)

    def show_idle_restart(restart: Restart, phase: str) -> None:
        if phase == WAITING and not dialogue.session.is_answering:  # an answer shows its restarts itself
            screen.restart(restart)

    def show_idle_failure(error: MlxK2Error) -> None:
        if not dialogue.session.is_answering:
            screen.log(f"error: {error}; the next message ends the chat, and the conversation is kept")

    engine = engine_on(
        deployment,
        drafts=options["draft"] == "ngram",
        on_report=restarting.on_report,
        restarts=restarting,
        on_restart=show_idle_restart,
        on_failure=show_idle_failure,
    )
    name = Model(request.source.path_or_repo, deployment.model.digest)
    dialogue = _Dialogue(options, engine, frontend, name, len(deployment.plans), screen, tools)
    with engine:
        dialogue.run(lambda: show_stage_use(restarting.deployment, engine.use), transcript)


def _chat_on_server(
    options: dict[str, Any], screen: Screen, tools: Tools | None, transcript: Transcript | None
) -> None:
    """Chat with the model of a running server."""
    engine = remote_engine(options["connect"])
    options = {**options, "model": engine.model_name}
    name = Model(engine.model_name, engine.frontend.model.digest)
    dialogue = _Dialogue(options, engine, engine.frontend, name, 1, screen, tools)
    dialogue.run(lambda: screen.log(f"the stages are those of the server {options['connect']}"), transcript)


class _Dialogue:
    """A conversation in the terminal with the model of ``source``."""

    def __init__(
        self,
        options: dict[str, Any],
        source: ReplySource,
        frontend: ModelFrontend,
        name: Model,
        num_stages: int,
        screen: Screen,
        tools: Tools | None,
    ) -> None:
        self._options = options
        self._frontend = frontend
        self._name = name
        self._screen = screen
        self._tools = tools
        conversation = new_conversation(options, frontend, () if tools is None else tools.declarations)
        self._usage = UsageTotals(frontend.context_tokens, num_stages, len(conversation.known_ids()))
        self._keyboard = choose_keyboard(list(HELP), self._usage.status)
        self._approval = ToolApproval(screen, self._keyboard, options["allowed_tools"], everything=options["yes"])
        toolkit = None if tools is None else Toolkit(tools, self._approval)
        settings = reply_settings(options, frontend)
        self.session = ChatSession(source, frontend.tokenizer, conversation, settings, toolkit)

    def run(self, show_stats: Callable[[], None], transcript: Transcript | None) -> None:
        """Run until the user leaves. ``show_stats`` shows what the stages do."""
        screen, name, options, frontend = self._screen, self._name, self._options, self._frontend
        self._approval.answer = self.session
        commands = Commands(
            self.session,
            name,
            screen,
            self._usage,
            self._tools,
            self._approval,
            show_stats,
            lambda thinking: reply_settings({**options, "thinking": thinking}, frontend).sampling.temperature,
        )
        if transcript is not None:
            transcript.write({"started": {"mlx-k2": __version__, "model": name.name, "digest": name.digest}})
        for line in (*opening_lines(options, frontend), f"{name.name} · /help lists the commands, Ctrl-D leaves"):
            screen.log(line)
        try:
            Repl(self.session, commands, self._keyboard, screen, self._usage, transcript).run()
        except BaseException:  # also a signal, a full disk and our own mistakes
            if self.session.conversation.messages:
                with suppress(OSError):  # the terminal may be gone
                    _rescue(commands, screen)
            raise


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
