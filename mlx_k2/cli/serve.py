"""`mlx-k2 serve`: the model behind an HTTP API, loaded once for every client."""

import ipaddress
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import click
import msgspec

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.cli.console import ConsoleListener, log, opening_lines, restart_line
from mlx_k2.cli.keys import key_file_option, key_path
from mlx_k2.cli.launchd import LABEL, property_list
from mlx_k2.cli.main import Interrupted
from mlx_k2.cli.options import cluster_options, draft_option, log_options, tool_grammar_option, with_struct
from mlx_k2.cli.program_command import ProgramCommand
from mlx_k2.cli.started_cluster import asked_request
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest, open_source
from mlx_k2.deployment.listener import StageReport
from mlx_k2.deployment.plan import DEFAULT_CONTEXT_TOKENS, StagePlan
from mlx_k2.deployment.restarting import WAITING, Restart, RestartingDeployment
from mlx_k2.errors import ClusterError, MlxK2Error, SetupError
from mlx_k2.protocol.messages import FromStage
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.server.access import Access
from mlx_k2.server.api_keys import KeyRing, read_keys
from mlx_k2.server.app import make_app
from mlx_k2.server.client_settings import CLAUDE_CODE_CONTEXT_TOKENS, CLIENTS, KEY_VARIABLE, ModelAddress
from mlx_k2.server.cluster_activity import ClusterActivity, CountedRestarts
from mlx_k2.server.http_server import HttpServer, url_for_others
from mlx_k2.server.language_model import LanguageModel
from mlx_k2.server.line_log import LineLog
from mlx_k2.server.server_state import ServerOptions, ServerState
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_frontend import ModelFrontend
from mlx_k2.weights.model_source import BUILTIN, ModelSource, is_repo

LONGEST_WAIT_S = 60.0


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mlx-k2 serve`."""

    cluster: ClusterOptions
    host: str
    port: int
    allowed_hosts: tuple[str, ...]
    allowed_origins: tuple[str, ...]
    key_file: str | None
    certfile: str | None
    keyfile: str | None
    max_sequences: int
    max_queued: int
    drain_s: float
    keepalive: Literal["comment", "chunk", "off"]
    strict_model: bool
    mirror_reasoning: bool
    draft_mode: DraftMode
    tool_grammar: bool
    print_settings: str | None
    launchd: bool
    log_dir: Path | None
    log_tokens: bool
    verbose: bool

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.port == 0 and (self.print_settings is not None or self.launchd):
            raise click.UsageError("clients must know the port: give --port")
        if self.keyfile is not None and self.certfile is None:
            raise click.UsageError("--keyfile is the private key of a certificate: add --certfile")


@click.command(cls=ProgramCommand)
@cluster_options
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 selects a free port.")
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A name by which clients reach this server, in addition to localhost, names in .local and addresses.",
)
@click.option(
    "--allow-origin",
    "allowed_origins",
    multiple=True,
    metavar="ORIGIN",
    help="An origin whose web pages may use this server, as https://chat.example.  [default: none]",
)
@key_file_option
@click.option("--certfile", type=click.Path(), metavar="FILE", help="A certificate in PEM format: serve HTTPS.")
@click.option("--keyfile", type=click.Path(), metavar="FILE", help="With --certfile: its private key.")
@click.option(
    "--max-sequences",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Requests that run at once, if the memory holds as many. Each has a cache of --context tokens.",
)
@click.option(
    "--max-queued",
    type=click.IntRange(1, 10_000),
    default=64,
    show_default=True,
    help="Requests that wait; further ones are answered with status 429.",
)
@click.option(
    "--drain",
    "drain_s",
    type=click.FloatRange(1, 86_400),
    default=30.0,
    metavar="SECONDS",
    help="After SIGTERM or Ctrl-C, let running requests continue for at most this long. A second signal ends at once.  "
    "[default: 30]",
)
@click.option(
    "--sse-keepalive",
    "keepalive",
    type=click.Choice(["comment", "chunk", "off"]),
    default="comment",
    show_default=True,
    help="Sent every 10 s in a stream without tokens: a comment, a chunk without text, or nothing.",
)
@click.option("--strict-model", is_flag=True, help="Answer 404 to a request that names another model.")
@click.option("--mirror-reasoning", is_flag=True, help="Send reasoning as `reasoning` and as `reasoning_content`.")
@draft_option
@tool_grammar_option
@click.option(
    "--print-settings",
    type=click.Choice(list(CLIENTS)),
    help="Print the settings with which a client uses this server, and exit. Give the same other options as for the "
    "server, such as --port.",
)
@click.option(
    "--launchd", is_flag=True, help="Print a property list with which macOS runs this command at login, and exit."
)
@log_options
@with_struct(ServeOptions)
def command(options: ServeOptions) -> None:
    """Serve the model to clients of OpenAI's and Anthropic's APIs, from one loaded cluster.

    \b
    On this machine, with the small built-in model:
        mlx-k2 serve
        curl http://127.0.0.1:8080/v1/models

    \b
    With Kimi K2 Thinking on two Macs:
        mlx-k2 serve --hostfile two-macs.json --model ~/Kimi-K2-Thinking

    Clients use the base address http://127.0.0.1:8080/v1, and any key until `mlx-k2 keys add` has made one. After a
    fault all stages start again, without a limit, and running answers continue.
    """  # noqa: D301  # click reads the escape
    if options.launchd:
        program = Path(sys.argv[0]).absolute()
        start = [sys.executable, "-P", "-m", "mlx_k2"] if program.name == "__main__.py" else [str(program)]
        command = [*start, *(one for one in sys.argv[1:] if one != "--launchd")]
        log(f"save this as ~/Library/LaunchAgents/{LABEL}.plist; launchctl bootstrap gui/$UID FILE starts it")
        path_variable = os.environ.get("PATH", os.defpath)
        sys.stdout.write(property_list(command, Path.cwd(), Path.home(), path_variable, options.drain_s))
        return
    request, model = open_source(asked_request(options.cluster, options.draft_mode, options.max_sequences))
    if options.print_settings is not None:
        settings = CLIENTS[options.print_settings]
        log(f"{settings.instruction}; {KEY_VARIABLE} is a key of the server, or any text if it has none")
        sys.stdout.write(settings.text_for(_model_address(options, request.source, model)))
        return
    answers = ServerOptions(
        keepalive=options.keepalive,
        strict_model=options.strict_model,
        mirrors_reasoning=options.mirror_reasoning,
    )
    state = ServerState(answers, _name_for_clients(request.source), ClusterActivity())
    address, files = (options.host, options.port), (options.certfile, options.keyfile)
    with (
        LineLog(log) as lines,
        HttpServer(
            make_app(state, _access(options, lines.write), lines.write), *address, options.drain_s, *files
        ) as server,
    ):
        lines.write(f"listening on {server.url}; requests are accepted when the model is loaded")
        try:
            _serve(options, replace(request, address=server.url_for_others), model, state, server, lines.write)
        finally:
            state.is_ending = True


class _ServeListener(ConsoleListener):
    """A console listener that also records what the stages load, for /v1/status."""

    def __init__(self, verbose: bool, write: Callable[[str], None], activity: ClusterActivity) -> None:
        super().__init__(verbose, write)
        self._activity = activity

    def phase(self, what: str) -> None:
        self._activity.phase = what
        super().phase(what)

    def planned(self, model: ModelDescription, plans: Sequence[StagePlan]) -> None:
        self._activity.plans = plans
        super().planned(model, plans)

    def progress(self, rank: int, message: FromStage) -> None:
        self._activity.progress(rank, message)
        super().progress(rank, message)


def _model_address(options: ServeOptions, source: ModelSource, model: ModelDescription | None) -> ModelAddress:
    """Return what a server with these options serves, without starting one."""
    longest = DEFAULT_CONTEXT_TOKENS if model is None else model.config.max_position_embeddings
    context_tokens = options.cluster.context_tokens or min(DEFAULT_CONTEXT_TOKENS, longest)
    url = url_for_others(options.host, options.port, is_https=options.certfile is not None)
    return ModelAddress(url, _name_for_clients(source), context_tokens)


def _access(options: ServeOptions, write: Callable[[str], None]) -> Access:
    """Return the rules for clients.

    Raises:
        SetupError: other machines could use the server without a key.
    """
    is_loopback = _is_loopback(options.host)
    path = key_path(options.key_file)
    keys = KeyRing(path, is_required=not is_loopback, log=write)
    if not is_loopback and not read_keys(path):
        file = "" if options.key_file is None else f" --key-file {shlex.quote(options.key_file)}"
        raise SetupError(
            f"--host {options.host} is reached from other machines, and there is no key: "
            f"make one with `mlx-k2 keys add{file} NAME`"
        )
    if not is_loopback and options.certfile is None:
        write("keys, prompts and answers pass the network unencrypted: --certfile and --keyfile change that")
    return Access(options.allowed_hosts, options.allowed_origins, keys)


def _serve(
    options: ServeOptions,
    request: DeploymentRequest,
    model: ModelDescription | None,
    state: ServerState,
    server: HttpServer,
    write: Callable[[str], None],
) -> None:
    """Load the model and serve it until a signal or a fault that is not recovered.

    ``write`` receives lines and never blocks.
    """
    failures: list[MlxK2Error] = []
    _keep_awake()

    def on_failure(error: MlxK2Error) -> None:
        failures.append(error)
        server.has_ended.set()

    def on_restart(restart: Restart, phase: str) -> None:
        state.activity.phase = phase
        if phase == WAITING:
            write(f"{restart_line(restart)}; running answers then continue")

    def on_report(report: StageReport) -> None:
        state.activity.add_report(report)
        if restarting.on_report is not None:
            restarting.on_report(report)

    with (
        _ServeListener(options.verbose, write, state.activity) as listener,
        RestartingDeployment(
            request,
            model,
            listener,
            limit=None,
            log_dir=options.log_dir,
            log_tokens=options.log_tokens,
            longest_wait_s=LONGEST_WAIT_S,
        ) as restarting,
    ):
        listener.hide_progress()
        deployment = restarting.deployment
        state.activity.deployed(deployment)
        frontend = ModelFrontend(deployment.model, deployment.shape.context_tokens)
        language_model = LanguageModel(frontend, state.model_name, tool_grammar=options.tool_grammar)
        with engine_on(
            deployment,
            draft_mode=options.draft_mode,
            on_report=on_report,
            restarts=CountedRestarts(state.activity, restarting),
            on_restart=on_restart,
            on_failure=on_failure,
            max_queued=options.max_queued,
        ) as engine:
            state.serve(engine, language_model)
            for line in opening_lines(options.cluster, frontend):
                write(line)
            if frontend.context_tokens < CLAUDE_CODE_CONTEXT_TOKENS:
                write(f"Claude Code needs: export CLAUDE_CODE_AUTO_COMPACT_WINDOW={frontend.context_tokens}")
            write(
                f"serving {state.model_name} at {server.url}/v1: {engine.num_slots} requests at once, "
                f"{frontend.context_tokens} tokens each"
            )
            try:
                server.has_ended.wait()
            except Interrupted:
                write(f"ending: running requests may continue for {options.drain_s:g} s; a second signal ends at once")
                state.is_ending = True
                server.drain()
            else:
                raise failures[0] if failures else ClusterError("the HTTP server has ended")


def _name_for_clients(source: ModelSource) -> str:
    """Return the name of the model for clients: the repository, or the name of the folder."""
    if source.path_or_repo == BUILTIN:
        return BUILTIN_FOLDER.name
    return source.path_or_repo if is_repo(source) else Path(source.path_or_repo).name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _keep_awake() -> None:
    """Keep this Mac from sleeping while this process runs. A host with a stage does so anyway."""
    if sys.platform == "darwin":
        subprocess.Popen(["/usr/bin/caffeinate", "-i", "-w", str(os.getpid())], stdin=subprocess.DEVNULL)
