"""Draws what `mlx-k2 bench` measured: throughput over streams, prefill over prompt length."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot

from mlx_k2.benchmark import Measured


def draw(rows: Sequence[Measured], path: Path) -> None:
    """Two charts side by side in one PNG."""
    figure, (decode, prefill) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for length in sorted({row.workload.prompt_tokens for row in rows}):
        of_length = [row for row in rows if row.workload.prompt_tokens == length]
        points = [(row.workload.streams, row.decode_tokens_per_s) for row in of_length]
        decode.plot(*zip(*points, strict=True), marker="o", label=f"prompts of {length}")
    for streams in sorted({row.workload.streams for row in rows}):
        of_streams = [row for row in rows if row.workload.streams == streams]
        points = [(row.workload.prompt_tokens, row.prefill_tokens_per_s) for row in of_streams]
        prefill.plot(*zip(*points, strict=True), marker="o", label=f"{streams} streams")
    decode.set(xlabel="streams", ylabel="decoded tokens/s, all streams", ylim=(0, None))
    prefill.set(xlabel="prompt tokens", ylabel="prefill tokens/s", ylim=(0, None))
    for chart in (decode, prefill):
        chart.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
