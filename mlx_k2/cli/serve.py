"""`mlx-k2 serve`: the model behind an HTTP API, loaded once for every client."""

import ipaddress
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.cli.console import log
from mlx_k2.cli.keys import api_keys_file, api_keys_option
from mlx_k2.cli.launchd import LABEL, property_list
from mlx_k2.cli.model_service import ModelService
from mlx_k2.cli.option_values import with_struct
from mlx_k2.cli.options import cluster_options, draft_option, log_options, tool_grammar_option
from mlx_k2.cli.program_command import ProgramCommand
from mlx_k2.cli.serve_options import ServeOptions
from mlx_k2.cli.started_cluster import prepare_request
from mlx_k2.deployment.cluster_options import open_source
from mlx_k2.deployment.plan import DEFAULT_CONTEXT_TOKENS
from mlx_k2.errors import SetupError
from mlx_k2.server.access import Access
from mlx_k2.server.api_keys import KeyRing, read_keys
from mlx_k2.server.app import make_app
from mlx_k2.server.client_settings import CLIENTS, KEY_VARIABLE, ModelAddress
from mlx_k2.server.cluster_activity import ClusterActivity
from mlx_k2.server.http_server import HttpServer, url_for_others
from mlx_k2.server.line_log import LineLog
from mlx_k2.server.server_state import ServerOptions, ServerState
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_source import BUILTIN, ModelSource, is_repo


@click.command(cls=ProgramCommand)
@cluster_options
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 selects a free port.")
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A name by which clients reach this server, in addition to this machine's name, localhost, names in .local "
    "and IP addresses.",
)
@click.option(
    "--allow-origin",
    "allowed_origins",
    multiple=True,
    metavar="ORIGIN",
    help="An origin whose web pages may use this server, such as https://chat.example.  [default: none]",
)
@api_keys_option
@click.option(
    "--certfile",
    "certificate_path",
    type=click.Path(),
    metavar="FILE",
    help="A certificate in PEM format: serve HTTPS.",
)
@click.option(
    "--keyfile", "certificate_key_path", type=click.Path(), metavar="FILE", help="With --certfile: its private key."
)
@click.option(
    "--max-sequences",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="The maximum number of requests that run at once; fewer if memory is short. Each has a cache of --context "
    "tokens.",
)
@click.option(
    "--max-queued",
    type=click.IntRange(1, 10_000),
    default=64,
    show_default=True,
    help="The maximum number of requests that wait; further ones are answered with status 429.",
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
    help="What is sent every 10 s while a stream has no tokens: a comment, a chunk without text, or nothing.",
)
@click.option("--strict-model", is_flag=True, help="Answer 404 to a request that names another model.")
@click.option("--mirror-reasoning", is_flag=True, help="Send reasoning as `reasoning` and as `reasoning_content`.")
@draft_option
@tool_grammar_option
@click.option(
    "--print-settings",
    type=click.Choice(list(CLIENTS)),
    help="Print the settings with which this client uses the server, and exit. Give all other options as for the "
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
        _print_property_list(options.drain_s)
        return
    request, model = open_source(prepare_request(options.cluster, options.draft_mode, options.max_sequences))
    if options.print_settings is not None:
        settings = CLIENTS[options.print_settings]
        log(f"{settings.instruction}; {KEY_VARIABLE} is a key of the server, or any text if it has none")
        sys.stdout.write(settings.text_for(_model_address(options, request.source, model)))
        return
    server_options = ServerOptions(
        keepalive=options.keepalive,
        strict_model=options.strict_model,
        mirrors_reasoning=options.mirror_reasoning,
    )
    state = ServerState(server_options, _name_for_clients(request.source), ClusterActivity())
    with LineLog(log) as line_log, _http_server(options, state, line_log.write) as server:
        line_log.write(f"listening on {server.url}; requests are accepted when the model is loaded")
        try:
            service = ModelService(options, state, server, line_log.write)
            service.run(replace(request, address=server.url_for_others), model)
        finally:
            state.is_ending = True


def _model_address(options: ServeOptions, source: ModelSource, model: ModelDescription | None) -> ModelAddress:
    """Return the address, model name and context that a server with these options has, without starting it."""
    max_tokens = DEFAULT_CONTEXT_TOKENS if model is None else model.config.max_position_embeddings
    context_tokens = options.cluster.context_tokens
    if context_tokens is None:
        context_tokens = min(DEFAULT_CONTEXT_TOKENS, max_tokens)
    url = url_for_others(options.host, options.port, is_https=options.certificate_path is not None)
    return ModelAddress(url, _name_for_clients(source), context_tokens)


def _print_property_list(drain_s: float) -> None:
    """Print the property list that runs the present command line without --launchd."""
    program = Path(sys.argv[0]).absolute()
    invocation = [sys.executable, "-P", "-m", "mlx_k2"] if program.name == "__main__.py" else [str(program)]
    arguments = [argument for argument in sys.argv[1:] if argument != "--launchd"]
    log(f"save this as ~/Library/LaunchAgents/{LABEL}.plist; launchctl bootstrap gui/$UID FILE starts it")
    path_variable = os.environ.get("PATH", os.defpath)
    sys.stdout.write(property_list([*invocation, *arguments], Path.cwd(), Path.home(), path_variable, drain_s))


def _http_server(options: ServeOptions, state: ServerState, write: Callable[[str], None]) -> HttpServer:
    """Return the HTTP server; raise the errors of ``_access`` and ``HttpServer``."""
    return HttpServer(
        make_app(state, _access(options, write), write),
        options.host,
        options.port,
        options.drain_s,
        options.certificate_path,
        options.certificate_key_path,
    )


def _access(options: ServeOptions, write: Callable[[str], None]) -> Access:
    """Return the hosts, origins and keys that the server accepts; log a warning if keys are sent unencrypted.

    Raises:
        SetupError: other machines could use the server without a key.
    """
    is_loopback = _is_loopback(options.host)
    path = api_keys_file(options.api_keys_path)
    keys = KeyRing(path, is_required=not is_loopback, log=write)
    if not is_loopback and not read_keys(path):
        key_option = "" if options.api_keys_path is None else f" --key-file {shlex.quote(options.api_keys_path)}"
        raise SetupError(
            f"--host {options.host} is reached from other machines, and there is no key: "
            f"make one with `mlx-k2 keys add{key_option} NAME`"
        )
    if not is_loopback and options.certificate_path is None:
        write("keys, prompts and answers pass the network unencrypted: --certfile and --keyfile change that")
    return Access(options.allowed_hosts, options.allowed_origins, keys)


def _name_for_clients(source: ModelSource) -> str:
    """Return the name that clients use for the model: the repository, or the last part of the folder's path."""
    if source.path_or_repo == BUILTIN:
        return BUILTIN_FOLDER.name
    return source.path_or_repo if is_repo(source) else Path(source.path_or_repo).name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
