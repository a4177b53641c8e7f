"""Charts of the results of `mlx-k2 bench`: throughput over streams, prefill over prompt length."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlx_k2.benchmark import WorkloadResult


def plot_results(rows: Sequence[WorkloadResult], path: Path, title: str) -> None:
    """Write two charts side by side to one PNG file: a dot for each run, a line through the means of repeated runs."""
    figure = Figure(figsize=(10, 4), layout="constrained")  # not pyplot's, which may load a window system
    figure.suptitle(title)
    decode_chart, prefill_chart = figure.subplots(1, 2)
    for length in sorted({row.workload.prompt_tokens for row in rows}):
        points = [
            (row.workload.streams, row.decode_tokens_per_s)
            for row in rows
            if row.workload.prompt_tokens == length and row.decode_tokens_per_s is not None
        ]
        _plot_means(decode_chart, points, f"prompts of {length} tokens")
    for streams in sorted({row.workload.streams for row in rows}):
        points = [
            (row.workload.prompt_tokens, row.prefill_tokens_per_s) for row in rows if row.workload.streams == streams
        ]
        _plot_means(prefill_chart, points, "1 stream" if streams == 1 else f"{streams} streams")
    decode_chart.set(xlabel="streams", ylabel="decoded tokens/s, all streams")
    prefill_chart.set(xlabel="prompt tokens", ylabel="prefill tokens/s, all streams")
    for chart, ticks in (
        (decode_chart, sorted({row.workload.streams for row in rows})),
        (prefill_chart, sorted({row.workload.prompt_tokens for row in rows})),
    ):
        chart.set_ylim(bottom=0)
        chart.set_xscale("log", base=2)
        chart.set_xticks(ticks, map(str, ticks))
        chart.minorticks_off()
        chart.grid(alpha=0.3)
        chart.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)


def _plot_means(chart: Axes, points: Sequence[tuple[int, float]], label: str) -> None:
    """Plot the points, and a line through the mean of the points at each x."""
    xs = sorted({x for x, _ in points})
    means = [fmean(y for point_x, y in points if point_x == x) for x in xs]
    (line,) = chart.plot(xs, means, label=label)
    chart.scatter([x for x, _ in points], [y for _, y in points], color=line.get_color())
