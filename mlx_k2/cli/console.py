"""Output of the commands on stderr while a cluster starts and after a run. stdout is reserved for the answer."""

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal

from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.status import Status
from rich.table import Table
from rich.text import Text

from mlx_k2.builtin import BANNER
from mlx_k2.cli.safe_console import SafeConsole
from mlx_k2.cli.streams import refuses_colour
from mlx_k2.coordinator.pipeline import StageUse
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest
from mlx_k2.deployment.deploy import Deployment
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.plan import RunShape, StagePlan, quantization_warnings
from mlx_k2.deployment.restarting import WAITING, Restart
from mlx_k2.protocol.messages import DownloadProgress, FromStage, LayerLoaded
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.index import file_ranges
from mlx_k2.weights.model_frontend import ModelFrontend

_PIPE_COLUMNS = 10_000
"""Width of the console for pipes and files, on which no table is folded."""
M3_ULTRA_GB_PER_S = 692.0
"""Memory bandwidth of an M3 Ultra that others measured over a long time. Apple specifies 819 GB/s."""

console = SafeConsole(
    stderr=True,
    highlight=False,
    markup=False,
    emoji=False,
    color_system=None if refuses_colour() else "auto",
)


def log(line: str) -> None:
    """Write a dim line to stderr. It has no line breaks at the terminal's width, so that it can be copied."""
    console.print(line, style="dim", soft_wrap=True)


def log_restart(restart: Restart, phase: str = WAITING) -> None:
    """Log a restart in the phase ``WAITING``, which is the first; do nothing in later phases."""
    if phase == WAITING:
        log(f"{restart_lines(restart)}; the answer then continues")


def restart_lines(restart: Restart) -> str:
    """Return the text about a restart on two lines: its reason; the wait before it and its number."""
    return f"{restart.reason}\nall stages start again in {restart.wait_s:g} s (restart {restart.count})"


def opening_lines(cluster: ClusterOptions, frontend: ModelFrontend, *, is_raw: bool = False) -> tuple[str, ...]:
    """Return lines for the user before the first answer: on the built-in model, and the template's warnings."""
    return (*(BANNER if cluster.model is None else ()), *(() if is_raw else frontend.template.warnings))


def gigabytes(num_bytes: int) -> str:
    """Return ``num_bytes`` as text with one decimal and a unit: GB, or MB below 1 GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def layer_range(plan: StagePlan) -> str:
    """Return a stage's first and last layer as FIRST-LAST."""
    return f"{plan.assignment.first_layer}-{plan.assignment.end_layer - 1}"


class ConsoleListener(DeploymentListener):
    """A listener that shows a spinner for each phase and a bar for each stage that loads. A context manager.

    Both are removed when the context ends. ``write`` receives each line.
    """

    def __init__(self, verbose: bool, write: Callable[[str], None] = log) -> None:
        self._verbose = verbose
        self._write = write
        self._hides_progress = False
        self._status = Status("", console=console)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._tasks: list[TaskID] = []
        self._plans: Sequence[StagePlan] = ()
        self._held_bytes: Counter[int] = Counter()

    def __enter__(self) -> "ConsoleListener":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_progress()

    def stop_progress(self) -> None:
        """Remove the spinner and the bars, before the answer is shown."""
        self._status.stop()
        if self._bars.live.is_started:
            self._bars.stop()

    def log(self, line: str) -> None:
        """Show a line of a stage's stderr, with --verbose only. Error messages quote the last lines in any case."""
        if self._verbose:
            self._write(line)

    def notify(self, line: str) -> None:
        """Show a line that the user should know."""
        self._write(line)

    def hide_progress(self) -> None:
        """Remove spinner and bars, and show no spinner again: the model is ready. With --verbose phases stay lines."""
        self.stop_progress()
        self._hides_progress = True

    def phase(self, what: str) -> None:
        """Show the next phase of all stages."""
        if self._verbose:
            self._write(f"{what} ...")
        elif console.is_terminal and not self._hides_progress:
            self.stop_progress()
            self._status.update(Text(f"{what} ..."))  # as text: a host's name is not markup
            self._status.start()

    def planned(self, model: ModelDescription, plans: Sequence[StagePlan]) -> None:
        """Add a bar for each stage; the bars appear at the first progress."""
        if model.unread_tensors_line:
            self._write(model.unread_tensors_line)
        for plan in plans:
            description = f"stage {plan.rank}  {plan.host.ssh}  layers {layer_range(plan)}"
            self._tasks.append(self._bars.add_task(description, total=None))
        self._plans = plans

    def progress(self, rank: int, message: FromStage) -> None:
        """Advance a stage's bar: the bytes that it fetches, then the bytes that it loads."""
        if isinstance(message, LayerLoaded):
            self._held_bytes[rank] += message.held_bytes
            total_bytes = self._plans[rank].shard_bytes
            self._bars.update(self._tasks[rank], total=total_bytes, completed=self._held_bytes[rank])
        elif isinstance(message, DownloadProgress):
            self._bars.update(self._tasks[rank], total=message.total_bytes, completed=message.done_bytes)
        if console.is_terminal and not self._bars.live.is_started:
            self._status.stop()
            self._bars.start()


def show_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[RenderableType]],
    *,
    left: Collection[str] = (),
    folded: Collection[str] = (),
) -> None:
    """Print a table to stderr. Columns are aligned to the right, except those in ``left`` and ``folded``.

    A narrow terminal folds long cells of the columns in ``folded``. In a pipe or a file each row is one line.
    """
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in headings:
        justify: Literal["left", "right"] = "left" if heading in (*left, *folded) else "right"
        table.add_column(heading, justify=justify, no_wrap=heading not in folded, overflow="fold")
    for row in rows:
        table.add_row(*row)
    if console.is_terminal:
        console.print(table)
    else:
        SafeConsole(stderr=True, highlight=False, color_system=None, width=_PIPE_COLUMNS).print(table)


def show_plan(plans: Sequence[StagePlan], rows: Sequence[Sequence[str]], headings: Sequence[str]) -> None:
    """Show a table of the stages: rank, host, layers, weights, and the cells of ``rows`` under ``headings``."""
    full_rows = [
        (str(plan.rank), plan.host.ssh, layer_range(plan), gigabytes(plan.shard_bytes), *row)
        for plan, row in zip(plans, rows, strict=True)
    ]
    show_table(("stage", "host", "layers", "weights", *headings), full_rows, left=["layers"], folded=["host"])


def show_dry_run(
    request: DeploymentRequest, model: ModelDescription, shape: RunShape, plans: Sequence[StagePlan]
) -> None:
    """Show each stage's host and layers, memory, bytes read per token, and files. Nothing was started."""
    if model.unread_tensors_line:
        log(model.unread_tensors_line)
    rows = [
        (
            gigabytes(plan.needed_bytes) + ("" if plan.limit_bytes is None else f" of {gigabytes(plan.limit_bytes)}"),
            gigabytes(plan.assignment.read_bytes),
            str(len(plan.files)),
        )
        for plan in plans
    ]
    show_plan(plans, rows, ("memory", "read per token", "files"))
    for plan in plans:
        log(f"stage {plan.rank} opens {file_ranges(plan.files)}")
    log(_fit_line(request, plans))
    # without gb_per_s the default is a Mac's bandwidth: left out if the only host is this machine and no Mac
    if sys.platform == "darwin" or any(not plan.host.is_local or plan.host.gb_per_s for plan in plans):
        log(_speed_limit_line(plans))
    for line in quantization_warnings(model.config, shape.dense_bits):
        log(line)
    log(f"memory is weights, cache and working space for {shape.context_tokens} tokens of context in {shape.dtype}")
    log("nothing was started")


def _fit_line(request: DeploymentRequest, plans: Sequence[StagePlan]) -> str:
    """Return the line about memory. Plans that do not fit have already raised an error where limits are known."""
    needed_bytes = sum(plan.needed_bytes for plan in plans)
    limits_bytes = [plan.limit_bytes for plan in plans if plan.limit_bytes is not None]
    if len(limits_bytes) < len(plans):
        return (
            f"needs {gigabytes(needed_bytes)}: run `{request.command_line('doctor')}` to ask the hosts whether it fits"
        )
    digits = 0 if needed_bytes >= 100e9 else 1
    return f"fits: {needed_bytes / 1e9:.{digits}f} of {sum(limits_bytes) / 1e9:.{digits}f} GB"


def _speed_limit_line(plans: Sequence[StagePlan]) -> str:
    """Return the line with the maximum rate of one stream, which reads ``read_bytes`` of all stages for each token."""
    bandwidths = [plan.host.gb_per_s or M3_ULTRA_GB_PER_S for plan in plans]
    token_s = sum(plan.assignment.read_bytes / 1e9 / rate for plan, rate in zip(plans, bandwidths, strict=True))
    hint = '; "gb_per_s" in the hostfile sets another' if any(plan.host.gb_per_s is None for plan in plans) else ""
    gb_per_s = " and ".join(dict.fromkeys(f"{rate:g}" for rate in bandwidths))
    return (
        f"one stream without draft tokens: at most {1 / token_s:.1f} tok/s, at {gb_per_s} GB/s of memory bandwidth"
        f"{hint}"
    )


def show_stage_use(deployment: Deployment, use: Sequence[StageUse]) -> None:
    """Show each stage's computing time and its fraction of the total."""
    total_s = sum(stage.busy_s for stage in use) or 1.0
    rows = [[f"{stage.busy_s:.2f} s", f"{100 * stage.busy_s / total_s:.0f}%"] for stage in use]
    show_plan(deployment.plans, rows, ("computing", "share"))
