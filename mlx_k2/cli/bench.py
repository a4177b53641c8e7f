"""`mlx-k2 bench`: throughput of the stages for several prompt lengths and numbers of streams."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import click
import msgspec

from mlx_k2.benchmark import Benchmark, ServerBenchmark, Workload, WorkloadResult, check_workloads
from mlx_k2.cli.bench_document import BenchDocument, append_csv, bench_document, check_csv
from mlx_k2.cli.connect import connect_option, remote_engine
from mlx_k2.cli.console import ConsoleListener, console, log, show_table
from mlx_k2.cli.option_values import Numbers, with_struct
from mlx_k2.cli.options import cluster_options, draft_option
from mlx_k2.cli.program_command import ProgramCommand
from mlx_k2.cli.started_cluster import prepare_request
from mlx_k2.cli.streams import write_utf8
from mlx_k2.cli.terminal_text import json_line
from mlx_k2.cli.trace import Trace
from mlx_k2.deployment.cluster_options import ClusterOptions, open_source
from mlx_k2.deployment.deploy import deploy
from mlx_k2.deployment.dry_run import preview
from mlx_k2.errors import RequestError
from mlx_k2.package_install import install_command
from mlx_k2.scheduling.drafter import DraftMode

_MAX_STREAMS = 64


class BenchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mlx-k2 bench`."""

    cluster: ClusterOptions
    connect: str | None
    prompt_lengths: tuple[int, ...]
    generate_tokens: int
    streams: tuple[int, ...]
    repeat: int
    draft_mode: DraftMode
    as_json: bool
    csv_path: str | None
    plot_path: str | None
    trace_path: str | None
    verbose: bool

    def __post_init__(self) -> None:
        """Refuse what cannot be measured or written, before hours are spent on measuring."""
        paths = {"csv": self.csv_path, "trace": self.trace_path, "plot": self.plot_path}
        if self.connect is not None and (self.as_json or any(path is not None for path in paths.values())):
            raise click.UsageError(
                "--json, --csv, --plot and --trace are about stages that this command starts: leave them out with "
                "--connect"
            )
        if max(self.streams) > _MAX_STREAMS:
            raise click.UsageError(f"--streams: at most {_MAX_STREAMS} sequences at once")
        for name, path in paths.items():
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise click.UsageError(f"--{name} {path}: there is no folder {Path(path).absolute().parent}")
        if self.csv_path is not None:
            check_csv(Path(self.csv_path))
        if self.plot_path is not None and Path(self.plot_path).suffix.lower() != ".png":
            raise click.UsageError(
                f"--plot {self.plot_path}: the charts are a PNG image: give a name that ends in .png"
            )
        if self.plot_path is not None and find_spec("matplotlib") is None:
            raise click.UsageError(f"--plot needs matplotlib: run `{install_command('matplotlib')}`")


@click.command(cls=ProgramCommand)
@cluster_options
@connect_option
@click.option(
    "--prompt-lengths", type=Numbers(1, "512,4096"), default="512,4096", show_default=True, help="Tokens of a prompt."
)
@click.option(
    "--generate",
    "generate_tokens",
    type=click.IntRange(min=2),
    default=128,
    show_default=True,
    help="Tokens that each stream generates.",
)
@click.option("--streams", type=Numbers(1, "1,2,4"), default="1,2,4,8", show_default=True, help="Sequences at once.")
@click.option("--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each combination.")
@draft_option
@click.option("--json", "as_json", is_flag=True, help="Print the result to stdout as one JSON document.")
@click.option("--csv", "csv_path", metavar="FILE", help="Append the rows to a CSV file.")
@click.option("--plot", "plot_path", metavar="FILE.png", help="Draw charts of the throughput; needs matplotlib.")
@click.option("--trace", "trace_path", metavar="FILE", help="Write every step of every stage, for ui.perfetto.dev.")
@with_struct(BenchOptions)
def command(options: BenchOptions) -> None:
    """Measure throughput: all combinations of prompt lengths and streams.

    \b
    On this machine, with the built-in model on two stages:
        mlx-k2 bench --prompt-lengths 128 --generate 32

    \b
    On two Macs:
        mlx-k2 bench --hostfile two-macs.json --model ~/Kimi-K2-Thinking --json > result.json

    Prompts are random tokens of which nothing is cached. Stop tokens are ignored. A warm-up before each combination is
    not counted. bench/METHODOLOGY.md defines each figure.
    """  # noqa: D301  # click reads the escape
    workloads = [
        Workload(length, options.generate_tokens, streams)
        for length in options.prompt_lengths
        for streams in options.streams
    ]
    if options.connect is None:
        _measure_stages(options, workloads)
    else:
        _measure_server(options.connect, workloads, options.repeat)


def _measure_server(url: str, workloads: Sequence[Workload], repeat: int) -> None:
    """Measure a running server and show the results."""
    engine = remote_engine(url)
    context_tokens = engine.frontend.context_tokens
    check_workloads(workloads, context_tokens, max_context_tokens=context_tokens)  # a client cannot set it
    benchmark = ServerBenchmark(engine.submit, engine.frontend.tokenizer.vocab_size)
    _show_results(list(_results(benchmark, workloads, repeat)))


def _measure_stages(options: BenchOptions, workloads: Sequence[Workload]) -> None:
    """Start stages, measure them, and write the results."""
    request, model = open_source(prepare_request(options.cluster, options.draft_mode, max(options.streams)))
    if model is not None:
        check_workloads(workloads, preview(request, model)[0].context_tokens, model.config.max_position_embeddings)
    with ConsoleListener(options.verbose) as listener, deploy(request, model, listener) as deployment:
        if model is None:  # this machine could not read the model, so that its context is known only now
            max_context_tokens = deployment.model.config.max_position_embeddings
            check_workloads(workloads, deployment.shape.context_tokens, max_context_tokens)
        listener.stop_progress()
        if deployment.shape.num_slots < max(options.streams):
            log(f"memory holds {deployment.shape.num_slots} sequences at once; further streams wait for a free slot")
        trace = None if options.trace_path is None else Trace([plan.host.ssh for plan in deployment.plans])
        on_report = None if trace is None else trace.add
        with Benchmark(deployment, draft_mode=options.draft_mode, on_report=on_report) as benchmark:
            results = list(_results(benchmark, workloads, options.repeat))
        document = bench_document(deployment, results, options.cluster.model, options.draft_mode.value)
    _write_results(document, results, trace, options)


def _results(benchmark: ServerBenchmark, workloads: Sequence[Workload], repeat: int) -> Iterator[WorkloadResult]:
    """Run each workload ``repeat`` times after a warm-up, and yield the results."""
    with console.status("") as status:
        for workload in workloads:
            status.update(f"prompts of {workload.prompt_tokens} tokens, {workload.streams} streams ...")
            benchmark.warm_up(workload)
            for number in range(repeat):
                yield benchmark.measure(workload, number)


def _write_results(
    document: BenchDocument, results: Sequence[WorkloadResult], trace: Trace | None, options: BenchOptions
) -> None:
    if options.as_json:
        write_utf8(msgspec.json.format(json_line(document), indent=2) + "\n")
    else:
        _show_results(results)
    try:
        if options.csv_path is not None:
            append_csv(Path(options.csv_path), document)
        if trace is not None and options.trace_path is not None:
            trace.write(Path(options.trace_path))
        if options.plot_path is not None:
            from mlx_k2.cli.plot import plot_results

            plot_results(results, Path(options.plot_path), _plot_title(document))
    except OSError as error:
        raise RequestError(f"{error.filename or 'a result file'} cannot be written: {error.strerror}") from None


def _plot_title(document: BenchDocument) -> str:
    hosts = ", ".join(dict.fromkeys(host.host for host in document.hosts))
    stages = "1 stage" if len(document.hosts) == 1 else f"{len(document.hosts)} stages"
    return f"{document.model}, {document.dtype}, {stages} on {hosts}, {document.made[:10]}"


def _show_results(results: Sequence[WorkloadResult]) -> None:
    log("prefill and decode are tokens/s of all streams, each: decode of one stream; p50, p95: between its tokens")
    headings = ("prompt", "streams", "first s", "prefill", "decode", "each", "p50 ms", "p95 ms", "busy %")
    rows = [
        (
            str(result.workload.prompt_tokens),
            str(result.workload.streams),
            f"{result.time_to_first_token_s:.2f}",
            f"{result.prefill_tokens_per_s:.1f}",
            _cell(result.decode_tokens_per_s, 1),
            _cell(result.decode_tokens_per_s_per_stream, 1),
            _cell(result.inter_token_p50_s, 1000),
            _cell(result.inter_token_p95_s, 1000),
            " ".join(f"{100 * fraction:.0f}" for fraction in result.stage_busy),
        )
        for result in results
    ]
    show_table(headings, rows)
    for result in results:
        _log_drafts(result)


def _log_drafts(result: WorkloadResult) -> None:
    """Log the accepted drafts by source and position, and the times from one token to the next."""
    if not result.drafts:
        return
    counts = [
        f"{count.source.value} {count.position}: {count.num_accepted} of {count.num_drafted}" for count in result.drafts
    ]
    log(f"drafts accepted, by source and position: {', '.join(counts)}")
    times = result.draft_times
    if times is not None:
        stages_ms = " + ".join(f"{1000 * seconds:.1f}" for seconds in times.stages_s)
        log(
            f"ms per token: accepted draft {1000 * times.right_s:.1f} (expected {1000 * times.cycle_s:.1f}), "
            f"no or a rejected draft {1000 * times.wrong_s:.1f}; stages {stages_ms}, hop {1000 * times.hop_s:.1f}, "
            f"draft head {1000 * times.head_s:.1f}"
        )


def _cell(value: float | None, scale: float) -> str:
    return "-" if value is None else f"{value * scale:.1f}"
