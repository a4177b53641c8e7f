"""`mlx-k2 doctor`: checks for problems of a cluster, before hundreds of GB are loaded."""

import click
import msgspec
from rich.text import Text

from mlx_k2.cli.console import ConsoleListener, console, log, show_table
from mlx_k2.cli.option_values import with_struct
from mlx_k2.cli.options import cluster_options
from mlx_k2.cli.program_command import ProgramCommand
from mlx_k2.cli.started_cluster import prepare_request
from mlx_k2.cli.streams import write_json_line
from mlx_k2.deployment.cluster_options import ClusterOptions, open_source
from mlx_k2.doctor.checks import Check, CheckResult
from mlx_k2.doctor.cluster_probe import probe_cluster

_STYLES = {CheckResult.OK: "green", CheckResult.WARNING: "yellow", CheckResult.FAILURE: "bold red"}


class DoctorOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mlx-k2 doctor`."""

    cluster: ClusterOptions
    deep: bool
    as_json: bool
    verbose: bool


@click.command(cls=ProgramCommand)
@cluster_options
@click.option(
    "--deep",
    is_flag=True,
    help="Read all files, compare their checksums with known ones and between hosts, and store them.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout: each check, then a summary.")
@with_struct(DoctorOptions)
def command(options: DoctorOptions) -> None:
    """Check every host and every hop, and show what to fix.

    \b
    Before and after the download of the model:
        mlx-k2 doctor --hostfile two-macs.json
        mlx-k2 doctor --hostfile two-macs.json --model moonshotai/Kimi-K2-Thinking

    The exit code is 1 if a check failed; with warnings only it is 0. Nothing is loaded. Nothing is changed, except that
    --deep writes a manifest of checksums to the model's folder.
    """  # noqa: D301  # click reads the escape
    request, model = open_source(prepare_request(options.cluster))
    with ConsoleListener(options.verbose) as listener:
        checks = probe_cluster(request, model, listener, deep=options.deep)
    if options.as_json:
        _print_json(checks)
    else:
        show_checks(checks)
    if any(check.result is CheckResult.FAILURE for check in checks):
        raise click.exceptions.Exit(1)


def show_checks(checks: tuple[Check, ...]) -> None:
    """Show a table of all checks without details, each problem with details, and the number of checks by result."""
    checks = tuple(sorted(checks, key=lambda check: check.host))
    rows = [
        (check.host, check.name, Text(check.result.value, _STYLES[check.result]), check.message.partition(": ")[0])
        for check in checks
    ]
    show_table(("host", "check", "", "found"), rows, left=["check", ""], folded=["host", "found"])
    for check in checks:
        if check.result is not CheckResult.OK:  # complete and on one line, so that its commands can be copied
            console.print(f"{check.host}, {check.name}: {check.message}", soft_wrap=True)
    log(", ".join(f"{_count(checks, result)} {result.value}" for result in CheckResult))


def _print_json(checks: tuple[Check, ...]) -> None:
    for check in checks:
        line = {
            "host": check.host,
            "check": check.name,
            "result": check.result.value,
            "found": check.message,
            "commands": check.commands,
        }
        write_json_line(line)
    write_json_line({"summary": {result.value: _count(checks, result) for result in CheckResult}})


def _count(checks: tuple[Check, ...], result: CheckResult) -> int:
    return sum(check.result is result for check in checks)
