"""Charts of the results of `mlx-k2 bench`: throughput over streams, prefill over prompt length."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlx_k2.benchmark import WorkloadResult


def plot_results(rows: Sequence[WorkloadResult], path: Path, title: str) -> None:
    """Write two charts side by side to one PNG file, with ticks at the measured values.

    A line joins the means of repeated runs; each run is a dot.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")  # not pyplot's, which may load a window system
    figure.suptitle(title)
    decode, prefill = figure.subplots(1, 2)
    for length in sorted({row.workload.prompt_tokens for row in rows}):
        points = [
            (row.workload.streams, row.decode_tokens_per_s)
            for row in rows
            if row.workload.prompt_tokens == length and row.decode_tokens_per_s is not None
        ]
        _line(decode, points, f"prompts of {length} tokens")
    for streams in sorted({row.workload.streams for row in rows}):
        points = [
            (row.workload.prompt_tokens, row.prefill_tokens_per_s) for row in rows if row.workload.streams == streams
        ]
        _line(prefill, points, "1 stream" if streams == 1 else f"{streams} streams")
    decode.set(xlabel="streams", ylabel="decoded tokens/s, all streams")
    prefill.set(xlabel="prompt tokens", ylabel="prefill tokens/s, all streams")
    for chart, measured in (
        (decode, {row.workload.streams for row in rows}),
        (prefill, {row.workload.prompt_tokens for row in rows}),
    ):
        chart.set_ylim(bottom=0)
        chart.set_xscale("log", base=2)
        chart.set_xticks(sorted(measured), map(str, sorted(measured)))
        chart.minorticks_off()
        chart.grid(alpha=0.3)
        chart.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _line(chart: Axes, points: Sequence[tuple[int, float]], label: str) -> None:
    xs = sorted({x for x, _ in points})
    means = [fmean([value for at, value in points if at == x]) for x in xs]
    (line,) = chart.plot(xs, means, label=label)
    chart.scatter([x for x, _ in points], [value for _, value in points], color=line.get_color())
