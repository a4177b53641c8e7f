"""Measurement of this machine's kernels. `mlx-k2 kernels` runs it as python -m mlx_k2.stage.measure_kernels.

The argument `report` prints a KernelReport as JSON, `check` one without speeds, in 0.4 GB of memory, and `decode` a
DecodeTime measured in the caller's environment.
"""

import json
import platform
import sys
import time
from collections.abc import Callable

import mlx.core as mx
import msgspec

from mlx_k2 import __version__
from mlx_k2.config import ModelConfig
from mlx_k2.kernels import check_cache, experts, reference, timing
from mlx_k2.kernels.report import DecodeTime, KernelLine, KernelReport
from mlx_k2.kernels.self_check import BATCH, DECODE, KernelCheck, LayerShape, random_stack
from mlx_k2.kernels.tuning import DEFAULT as DEFAULT_TUNING
from mlx_k2.kernels.tuning import Tuning
from mlx_k2.model.decoder_layer import make_feed_forward
from mlx_k2.model.layer_weights import DenseWeights, MoeWeights
from mlx_k2.stage.host import on_gpu
from mlx_k2.weights.config_fields import thinking_config_fields

SMALL_LAYER = LayerShape(hidden_size=1024, intermediate_size=512, top_k=8, dtype=mx.float32)
"""Layer measured without a GPU: enough to show that the reference runs."""


def main() -> None:
    """Measure and print one line of JSON."""
    programs: dict[str, Callable[[], KernelReport | DecodeTime]] = {
        "report": measure_report,
        "check": check_report,
        "decode": measure_decode,
    }
    sys.stdout.write(msgspec.json.encode(programs[sys.argv[1]]()).decode() + "\n")


def measure_report() -> KernelReport:
    """Return the kernels of this machine, their best sizes and their speed. Without a GPU measure plain MLX only."""
    report = _new_report(plain_mlx_gb_per_s=_plain_mlx_gb_per_s())
    if not on_gpu():
        return report
    shape = _layer_shape(_k2())
    tuning = _best_tuning(shape)
    rows = timing.kernel_table(shape, tuning or DEFAULT_TUNING)
    router = _checks(shape._replace(intermediate_size=0))
    return msgspec.structs.replace(
        report,
        chip=experts.chip(),
        read_gb_per_s=rows[0].plain_read_gigabytes_per_second,
        kernels=(*map(_line, rows), *map(_untimed, router)),
        sizes=tuning._asdict() if tuning else {},
    )


def check_report() -> KernelReport:
    """Return the checks of this machine's kernels at K2's shape, made now. Time nothing."""
    report = _new_report()
    if not on_gpu():
        return report
    shape = _layer_shape(_k2())
    checks = [*experts.new_checks(shape), *experts.new_checks(shape._replace(intermediate_size=0))]
    return msgspec.structs.replace(report, chip=experts.chip(), kernels=tuple(map(_untimed, checks)))


def _new_report(plain_mlx_gb_per_s: float | None = None) -> KernelReport:
    return KernelReport(
        mlx_k2_version=__version__,
        mlx_version=check_cache.mlx_version(),
        system=platform.platform(terse=True),
        chip=None,
        plain_mlx_gb_per_s=plain_mlx_gb_per_s,
    )


def _untimed(check: KernelCheck) -> KernelLine:
    return KernelLine(**check._asdict(), ran=check.error is not None)


def _line(row: timing.KernelRow) -> KernelLine:
    return msgspec.structs.replace(
        _untimed(row.check),
        tokens=row.tokens,
        gb_per_s=row.kernel.gigabytes_per_second if row.kernel else None,
        plain_mlx_gb_per_s=row.reference.gigabytes_per_second,
    )


def _plain_mlx_gb_per_s() -> float:
    shape = _layer_shape(_k2()) if on_gpu() else SMALL_LAYER
    stack = random_stack(shape, timing.NUM_EXPERTS)
    mx.eval(stack)
    return timing.time_layer(reference.routed_experts, stack, 1, shape.top_k).gigabytes_per_second


def measure_decode() -> DecodeTime:
    """Return the best time of one token through the feed-forward blocks in sequence, as a stage runs them."""
    config = _k2()
    shape = _layer_shape(config)
    weights = _random_block(config, shape)
    feed_forward = make_feed_forward(config)
    norm = mx.ones(config.hidden_size, mx.bfloat16)

    def block(hidden: mx.array, weights: MoeWeights) -> mx.array:
        return hidden + feed_forward(mx.fast.rms_norm(hidden, norm, config.rms_norm_eps), weights)

    experts.prepare(weights.experts, shape.top_k, mx.bfloat16)
    compiled = mx.compile(block)
    best = float("inf")
    for _ in range(timing.REPEATS + 1):  # the first iteration compiles
        hidden = mx.random.normal((1, config.hidden_size)).astype(mx.bfloat16)
        mx.eval(hidden)
        start = time.perf_counter()
        for _ in range(config.num_hidden_layers - config.first_k_dense_replace):
            hidden = compiled(hidden, weights)
        mx.eval(hidden)
        best = min(best, time.perf_counter() - start)
    return DecodeTime(best)


def _k2() -> ModelConfig:
    fields = thinking_config_fields(n_routed_experts=timing.NUM_EXPERTS)
    return ModelConfig.from_json(json.dumps(fields).encode(), "Kimi K2 Thinking's shapes")


def _layer_shape(config: ModelConfig) -> LayerShape:
    return LayerShape(config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok, mx.bfloat16)


def _checks(shape: LayerShape) -> list[KernelCheck]:
    return experts.checks(shape, check_cache.DEFAULT_DIRECTORY).checks


def _best_tuning(shape: LayerShape) -> Tuning | None:
    """Return the fastest sizes and cache them; None if a kernel that has sizes may not run."""
    usable = {check.kernel for check in _checks(shape) if check.usable}
    return timing.best_tuning(shape, DEFAULT_TUNING) if usable >= {DECODE, BATCH} else None


def _random_block(config: ModelConfig, shape: LayerShape) -> MoeWeights:
    hidden, intermediate = shape.hidden_size, shape.intermediate_size

    def matrix(rows: int, columns: int) -> mx.array:
        values: mx.array = mx.random.normal((rows, columns)) * rows**-0.5
        return values.astype(mx.bfloat16)

    block = MoeWeights(
        router=matrix(config.n_routed_experts, hidden),
        correction_bias=mx.zeros(config.n_routed_experts),
        experts=random_stack(shape, config.n_routed_experts),
        shared=DenseWeights(matrix(hidden, intermediate), matrix(hidden, intermediate), matrix(intermediate, hidden)),
    )
    mx.eval(block)
    return block


if __name__ == "__main__":
    main()
