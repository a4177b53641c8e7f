"""`mlx-k2 serve`: the model behind an HTTP API, loaded once for every client."""

import ipaddress
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.cli.console import ConsoleListener, log, log_restart
from mlx_k2.cli.main import Interrupted
from mlx_k2.cli.option_values import deployment_request, log_settings, open_source, opening_lines
from mlx_k2.cli.options import cluster_options, draft_option, log_options
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.deployment.deployment_request import DeploymentRequest
from mlx_k2.deployment.restarting import RestartingDeployment
from mlx_k2.errors import MlxK2Error, SetupError
from mlx_k2.server.app import make_app
from mlx_k2.server.http_server import HttpServer
from mlx_k2.server.served_model import ServedModel
from mlx_k2.server.service import ServerOptions, Service
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_frontend import ModelFrontend
from mlx_k2.weights.model_source import BUILTIN, ModelSource, is_repo

LONGEST_WAIT_S = 60.0


@click.command()
@cluster_options
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 takes a free port.")
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A name by which clients reach this server, besides localhost, names in .local and addresses.",
)
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
    help="After SIGTERM or Ctrl-C, let running requests go on for so long. A second signal ends at once.  "
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
@click.option("--mirror-reasoning", is_flag=True, help="Send reasoning as `reasoning`, besides `reasoning_content`.")
@draft_option
@log_options
def command(**options: Any) -> None:
    """Serve the model to clients of OpenAI's API, from one loaded cluster.

    \b
    On this machine, with the small built-in model:
        mlx-k2 serve
        curl http://127.0.0.1:8080/v1/models

    \b
    With Kimi K2 Thinking on two Macs:
        mlx-k2 serve --hostfile two-macs.json --model ~/Kimi-K2-Thinking

    Clients use the base address http://127.0.0.1:8080/v1 and any key. After a fault all stages start again, for ever,
    and running answers go on where they were.
    """  # noqa: D301  # click reads the escape
    if not _is_loopback(options["host"]):
        raise SetupError(
            f"--host {options['host']} is reached from other machines, and this server has no keys yet: leave it out"
        )
    request = replace(deployment_request(options), num_slots=options["max_sequences"])
    for line in request.hostfile.warnings:
        log(line)
    request, model = open_source(request)
    server_options = ServerOptions(
        allowed_hosts=options["allowed_hosts"],
        keepalive=options["keepalive"],
        strict_model=options["strict_model"],
        mirrors_reasoning=options["mirror_reasoning"],
    )
    service = Service(server_options, _served_name(request.source))
    with HttpServer(make_app(service, log), options["host"], options["port"], options["drain_s"]) as server:
        log(f"listening on http://{server.address}; requests are taken when the model is loaded")
        _serve(options, request, model, service, server)


def _serve(
    options: dict[str, Any],
    request: DeploymentRequest,
    model: ModelDescription | None,
    service: Service,
    server: HttpServer,
) -> None:
    """Load the model and serve it until a signal or a failure for good."""
    failures: list[MlxK2Error] = []
    has_failed = threading.Event()

    def on_failure(error: MlxK2Error) -> None:
        failures.append(error)
        has_failed.set()

    settings = log_settings(options)
    with (
        ConsoleListener(options["verbose"]) as listener,
        RestartingDeployment(
            request,
            model,
            listener,
            limit=None,
            log_dir=settings[0],
            log_tokens=settings[1],
            longest_wait_s=LONGEST_WAIT_S,
        ) as restarting,
    ):
        listener.hide_progress()
        deployment = restarting.deployment
        frontend = ModelFrontend(deployment.model, deployment.shape.context_tokens)
        served = ServedModel(frontend, service.model_name)
        with engine_on(
            deployment,
            drafts=options["draft"] == "ngram",
            on_report=restarting.on_report,
            restarts=restarting,
            on_restart=log_restart,
            on_failure=on_failure,
            max_queued=options["max_queued"],
        ) as engine:
            service.serve(engine, served)
            for line in opening_lines(options, frontend):
                log(line)
            log(
                f"serving {service.model_name} at http://{server.address}/v1: {engine.num_slots} requests at once, "
                f"{frontend.context_tokens} tokens each"
            )
            try:
                has_failed.wait()
            except Interrupted:
                log(f"ending: running requests may go on for {options['drain_s']:g} s; a second signal ends at once")
                server.drain()
        if failures:
            raise failures[0]


def _served_name(source: ModelSource) -> str:
    """Return the name of the model for clients: the repository, or the name of the folder."""
    if source.path_or_repo == BUILTIN:
        return BUILTIN_FOLDER.name
    return source.path_or_repo if is_repo(source) else Path(source.path_or_repo).name


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
