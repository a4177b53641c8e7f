"""`mlx-k2 download`: each host fetches the files of its stage."""

import click
import msgspec

from mlx_k2.cli.console import ConsoleListener, log, show_plan
from mlx_k2.cli.option_values import with_struct
from mlx_k2.cli.options import cluster_options
from mlx_k2.cli.program_command import ProgramCommand
from mlx_k2.cli.started_cluster import prepare_request
from mlx_k2.deployment.cluster_options import ClusterOptions, open_source
from mlx_k2.deployment.deploy import download
from mlx_k2.errors import DownloadError
from mlx_k2.weights.model_source import is_repo


class DownloadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mlx-k2 download`."""

    cluster: ClusterOptions
    verbose: bool


@click.command(cls=ProgramCommand)
@cluster_options
@with_struct(DownloadOptions)
def command(options: DownloadOptions) -> None:
    """Fetch each stage's files from the Hub, on the stage's own host. Nothing is loaded.

    \b
    On two Macs, about half of the files on each:
        mlx-k2 download --hostfile two-macs.json --model moonshotai/Kimi-K2-Thinking

    Complete files stay: run the command again after an interruption. mlx-k2 generate uses these files when hostfile,
    split, context and bits are the same.
    """  # noqa: D301  # click reads the escape
    request = prepare_request(options.cluster)
    if not is_repo(request.source):
        raise DownloadError("give --model a repository on the Hub, for instance --model moonshotai/Kimi-K2-Thinking")
    request, model = open_source(request)
    with ConsoleListener(options.verbose) as listener:
        downloads = download(request, model, listener)
    rows = [[str(len(plan.files)), str(len(result.fetched))] for plan, result in downloads]
    show_plan([plan for plan, _ in downloads], rows, ("files", "fetched now"))
    for plan, result in downloads:
        log(f"the files of stage {plan.rank} are in {result.folder}")
    log("every stage has its files")
