"""What the commands show on stderr while a cluster comes up and after it ran. stdout is left to the answer."""

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from mlx_k2.control.messages import DownloadProgress, FromStage, LayerLoaded
from mlx_k2.coordinator import StageUse
from mlx_k2.deployment import Deployment, Watcher
from mlx_k2.plan import RunShape, StagePlan
from mlx_k2.weights.checkpoint import ModelDescription

console = Console(stderr=True, highlight=False)


def gigabytes(num_bytes: int) -> str:
    """Bytes for people: GB with one decimal, MB below one."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def layer_range(plan: StagePlan) -> str:
    """A stage's layers, first and last."""
    return f"{plan.share.first_layer}-{plan.share.end_layer - 1}"


class ConsoleWatcher(Watcher):
    """Shows a deployment: a line for each phase, and a bar for each stage that loads. A context, to end the bars."""

    def __init__(self, verbose: bool) -> None:
        self._verbose = verbose
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[int, TaskID] = {}

    def __enter__(self) -> "ConsoleWatcher":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.done()

    def done(self) -> None:
        """Take the bars away: what follows is the answer."""
        self._progress.stop()

    def log(self, line: str) -> None:
        """A line of a stage's stderr; shown with --verbose, kept by the group for errors otherwise."""
        if self._verbose:
            console.print(line, style="dim", markup=False, soft_wrap=True)

    def phase(self, what: str) -> None:
        """The next thing that all stages do."""
        if self._verbose:
            console.print(f"{what} ...", style="dim", markup=False)

    def planned(self, model: ModelDescription, plans: Sequence[StagePlan]) -> None:
        """A bar for each stage, as long as its shard is large."""
        if model.note:
            console.print(model.note, style="dim", markup=False, soft_wrap=True)
        for plan in plans:
            description = f"stage {plan.rank}  {plan.host.ssh}  layers {layer_range(plan)}"
            self._tasks[plan.rank] = self._progress.add_task(description, total=plan.shard_bytes)

    def progress(self, rank: int, message: FromStage) -> None:
        """Advance a stage's bar."""
        if isinstance(message, LayerLoaded):
            self._progress.advance(self._tasks[rank], message.held_bytes)
        elif isinstance(message, DownloadProgress):
            self._progress.update(self._tasks[rank], total=message.total_bytes, completed=message.done_bytes)


def show_plan(plans: Sequence[StagePlan], rows: Sequence[Sequence[str]], headings: Sequence[str]) -> None:
    """A table with a line for each stage: rank, host, layers, bytes, and ``rows`` beside them under ``headings``."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("stage", "host", "layers", "bytes", *headings):
        table.add_column(heading, justify="left" if heading in ("host", "layers") else "right")
    for plan, row in zip(plans, rows, strict=True):
        table.add_row(str(plan.rank), plan.host.ssh, layer_range(plan), gigabytes(plan.shard_bytes), *row)
    console.print(table)


def show_dry_run(model: ModelDescription, shape: RunShape, plans: Sequence[StagePlan]) -> None:
    """What would run where, what each stage would hold and read, and the files that it would open."""
    if model.note:
        console.print(model.note, style="dim", markup=False, soft_wrap=True)
    cells = [(gigabytes(plan.needed_bytes), gigabytes(plan.share.read_bytes), str(len(plan.files))) for plan in plans]
    show_plan(plans, cells, ("memory", "read a token", "files"))
    console.print(f"{shape.dtype}, context {shape.context_tokens} tokens; nothing was started", markup=False)
    for plan in plans:
        console.print(f"stage {plan.rank} files: {', '.join(plan.files)}", style="dim", markup=False, soft_wrap=True)


def show_stage_use(deployment: Deployment, use: Sequence[StageUse]) -> None:
    """Each stage's share of the computing time."""
    total_s = sum(stage.busy_s for stage in use) or 1.0
    rows = [[f"{stage.busy_s:.2f} s", f"{100 * stage.busy_s / total_s:.0f}%"] for stage in use]
    show_plan(deployment.plans, rows, ("computing", "share"))
