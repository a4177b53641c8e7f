"""Measurement of this machine's kernels. `mlx-k2 kernels` runs it as python -m mlx_k2.stage.measure_kernels.

With the argument `report` the program prints a KernelReport as JSON, with `check` one without speeds. With `decode`,
`idle` and `attention` it prints times; these depend on MLX's settings in the environment.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import mlx.core as mx
import msgspec

from mlx_k2 import __version__
from mlx_k2.cluster.memory import GPU_MIN_HEADS, LARGEST_BLOCK_BYTES
from mlx_k2.config import ModelConfig
from mlx_k2.kernels import check_cache, experts, reference, timing
from mlx_k2.kernels.layer_time import best_seconds, time_layer
from mlx_k2.kernels.report import AttentionTime, DecodeTime, IdleTime, KernelReport
from mlx_k2.kernels.self_check import BATCH, DECODE, LayerShape, random_stack
from mlx_k2.kernels.stack import ExpertStack
from mlx_k2.kernels.tuning import DEFAULT as DEFAULT_TUNING
from mlx_k2.model.attention import AttentionLimits, attend_naive
from mlx_k2.model.decoder_layer import make_feed_forward
from mlx_k2.model.layer_weights import AttentionWeights, DenseWeights, MoeWeights
from mlx_k2.stage.host import on_gpu, working_set_bytes
from mlx_k2.stage.kernel_checks import layer_shape
from mlx_k2.weights.known_layout import thinking_config_fields

SMALL_LAYER = LayerShape(hidden_size=1024, intermediate_size=512, top_k=8, dtype=mx.float32, num_experts=64)
"""The layer that is measured without a GPU: large enough to show that the reference runs."""
SMALL_NUM_EXPERTS = 64
"""Number of experts for machines without memory for all experts of a layer."""
IDLE_S = 5.0
CHUNK_TOKENS, NUM_CHUNKS = 2048, 4
SMALL_BLOCK_BYTES = 16 * 2**20
"""Size of attention's blocks that is too small for the queries of a chunk, so that the fused kernel is used."""
_MAX_STACKS = 16
_BYTES_FOR_ALL_EXPERTS = 32 * 10**9
"""GPU memory needed to measure a layer with 384 experts: 9.5 GB, and as much again for plain MLX's conversion."""


def main() -> None:
    """Make the measurement that the first argument names, and print its result as one line of JSON."""
    measurements: dict[str, Callable[[], KernelReport | DecodeTime | IdleTime | AttentionTime]] = {
        "report": measure_report,
        "check": check_report,
        "decode": measure_decode,
        "idle": measure_idle,
        "attention": measure_attention,
    }
    sys.stdout.write(msgspec.json.encode(measurements[sys.argv[1]]()).decode() + "\n")


def measure_report() -> KernelReport:
    """Return this machine's kernels, checked now, with their best sizes and their speed.

    Without a GPU measure plain MLX only.
    """
    report = _new_report(plain_mlx_gb_per_s=_plain_mlx_gb_per_s())
    if not on_gpu():
        return report
    shape = layer_shape(_k2_config(), mx.bfloat16)
    checks, router_checks = (
        experts.checks(checked_shape, check_cache.DEFAULT_DIRECTORY, again=True).checks
        for checked_shape in (shape, shape._replace(intermediate_size=0))  # the experts, and the router alone
    )
    usable = {check.kernel for check in checks if check.usable}
    tuning = timing.best_tuning(shape, DEFAULT_TUNING) if usable >= {DECODE, BATCH} else None
    stack = random_stack(shape, shape.num_experts)
    mx.eval(stack)
    lines = timing.kernel_lines(shape, stack, tuning or DEFAULT_TUNING)
    return msgspec.structs.replace(
        report,
        chip=experts.chip(),
        read_gb_per_s=timing.plain_read_gigabytes_per_second(stack),
        kernels=(*lines, *map(timing.untimed_line, router_checks)),
        sizes=tuning._asdict() if tuning else {},
    )


def check_report() -> KernelReport:
    """Return this machine's kernels, checked now at K2's shape, without speeds."""
    report = _new_report()
    if not on_gpu():
        return report
    shape = layer_shape(_k2_config(), mx.bfloat16)
    checks = [*experts.new_checks(shape), *experts.new_checks(shape._replace(intermediate_size=0))]
    return msgspec.structs.replace(report, chip=experts.chip(), kernels=tuple(map(timing.untimed_line, checks)))


def _new_report(plain_mlx_gb_per_s: float | None = None) -> KernelReport:
    return KernelReport(
        mlx_k2_version=__version__,
        mlx_version=version("mlx"),
        system=platform.platform(terse=True),
        chip=None,
        plain_mlx_gb_per_s=plain_mlx_gb_per_s,
    )


def _plain_mlx_gb_per_s() -> float:
    shape = layer_shape(_k2_config(), mx.bfloat16) if on_gpu() else SMALL_LAYER
    stack = random_stack(shape, shape.num_experts)
    mx.eval(stack)
    return time_layer(reference.routed_experts, stack, tokens=1, top_k=shape.top_k).gigabytes_per_second


def measure_decode() -> DecodeTime:
    """Return the best time of one token through K2's 60 feed-forward blocks with experts, as a stage runs them."""
    config = _k2_config()
    shape = layer_shape(config, mx.bfloat16)
    weights = _random_moe_weights(config, shape)
    feed_forward = make_feed_forward(config)
    norm = mx.ones(config.hidden_size, mx.bfloat16)

    def block(hidden: mx.array, weights: MoeWeights) -> mx.array:
        return hidden + feed_forward(mx.fast.rms_norm(hidden, norm, config.rms_norm_eps), weights)

    experts.warnings_for(shape)  # makes the checks of kernels now: they cannot run while `block` is compiled
    compiled = mx.compile(block)
    hidden = _random_array(1, config.hidden_size)

    def run_blocks() -> None:
        output = hidden
        for _ in range(config.num_hidden_layers - config.first_k_dense_replace):
            output = compiled(output, weights)
        mx.eval(output)

    return DecodeTime(best_seconds(run_blocks))


def measure_idle() -> IdleTime:
    """Return the time to read wired memory right after the last read, and after IDLE_S without GPU work."""
    shape = layer_shape(_k2_config(), mx.bfloat16)
    limit_bytes = working_set_bytes() or 0
    stacks = [random_stack(shape, shape.num_experts)]
    stack_bytes = sum(array.nbytes for array in stacks[0])
    for _ in range(min(_MAX_STACKS, limit_bytes // 2 // stack_bytes) - 1):  # in half of the GPU's memory
        stacks.append(ExpertStack(*(array + 0 for array in stacks[0])))  # + 0 makes a copy
        mx.eval(stacks[-1])
    if limit_bytes:
        mx.set_wired_limit(min(limit_bytes, len(stacks) * stack_bytes))

    def read_seconds() -> float:
        start_s = time.perf_counter()
        mx.eval([mx.max(array) for stack in stacks for array in stack])
        return time.perf_counter() - start_s

    warm_s = min(read_seconds() for _ in range(3))
    time.sleep(IDLE_S)
    return IdleTime(len(stacks) * stack_bytes, warm_s, read_seconds())


def measure_attention() -> AttentionTime:
    """Return the times of one layer's attention for the last of NUM_CHUNKS chunks, fused and unfused."""
    config = _k2_config()
    heads, nope, latent = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    unused = _random_array(1, 1)
    weights = AttentionWeights(
        query=unused,
        latent_down=unused,
        latent_norm=mx.ones(latent),
        key_up=_random_array(heads, nope, latent, scale=latent**-0.5),
        value_up=_random_array(heads, latent, config.v_head_dim, scale=latent**-0.5),
        output=unused,
    )
    queries = _random_array(heads, CHUNK_TOKENS, config.qk_head_dim, scale=latent**-0.5)
    cache_rows = _random_array(NUM_CHUNKS * CHUNK_TOKENS, config.cache_row_dim, scale=latent**-0.5)
    position = (NUM_CHUNKS - 1) * CHUNK_TOKENS

    def seconds(limits: AttentionLimits) -> float:
        return best_seconds(lambda: mx.eval(attend_naive(queries, cache_rows, position, weights, limits)), repeats=3)

    fused = AttentionLimits(SMALL_BLOCK_BYTES, fused=on_gpu())
    return AttentionTime(seconds(fused), seconds(AttentionLimits(LARGEST_BLOCK_BYTES, GPU_MIN_HEADS)))


def _k2_config() -> ModelConfig:
    """Return K2's config, with fewer experts on a machine without memory for all experts of a layer."""
    memory_bytes = working_set_bytes()
    is_large = memory_bytes is None or memory_bytes >= _BYTES_FOR_ALL_EXPERTS
    fields = thinking_config_fields(n_routed_experts=384 if is_large else SMALL_NUM_EXPERTS)
    return ModelConfig.from_json(json.dumps(fields).encode(), "Kimi K2 Thinking's shapes")


def _random_moe_weights(config: ModelConfig, shape: LayerShape) -> MoeWeights:
    hidden, intermediate = shape.hidden_size, shape.intermediate_size

    def matrix(rows: int, columns: int) -> mx.array:
        return _random_array(rows, columns, scale=rows**-0.5)

    weights = MoeWeights(
        router=matrix(config.n_routed_experts, hidden),
        correction_bias=mx.zeros(config.n_routed_experts),
        experts=random_stack(shape, config.n_routed_experts),
        shared=DenseWeights(matrix(hidden, intermediate), matrix(hidden, intermediate), matrix(intermediate, hidden)),
    )
    mx.eval(weights)
    return weights


def _random_array(*shape: int, scale: float = 1.0) -> mx.array:
    """Return an evaluated array of bfloat16 with the standard deviation ``scale``."""
    array: mx.array = (mx.random.normal(shape) * scale).astype(mx.bfloat16)
    mx.eval(array)
    return array


if __name__ == "__main__":
    main()
