"""The option --connect of commands that can use the cluster of a running server."""

import os

import click

from mlx_k2.client.remote_engine import RemoteEngine
from mlx_k2.client.server_connection import ServerAddress
from mlx_k2.deployment.cluster_options import ClusterOptions

_SERVER_OPTIONS = {*ClusterOptions.__struct_fields__, "restarts", "draft_mode", "log_dir", "log_tokens"}
"""Names of the parameters that apply to stages, which a server has started with its own values."""

connect_option = click.option(
    "--connect",
    metavar="URL",
    help="Use the model of a running `mlx-k2 serve`, for instance http://127.0.0.1:8080. The key, if the server needs "
    "one, is in MLX_K2_API_KEY.",
)


def remote_engine(url: str) -> RemoteEngine:
    """Return the engine of the server at ``url``.

    Raises:
        UsageError: the command line has an option for stages, which the server has started with its own.
        SetupError, ClusterError: the server cannot be used.
    """
    context = click.get_current_context()
    command_line = click.core.ParameterSource.COMMANDLINE
    for parameter in context.command.params:
        if parameter.name in _SERVER_OPTIONS and context.get_parameter_source(parameter.name) is command_line:
            raise click.UsageError(f"{parameter.opts[0]} is the server's to choose: leave it out with --connect")
    base_url = url.rstrip("/").removesuffix("/v1")  # other clients use the address with /v1
    return RemoteEngine(ServerAddress(base_url, os.environ.get("MLX_K2_API_KEY")))
