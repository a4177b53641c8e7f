"""Tests of bench.graph_launches: its table of an expert layer's launches, and the command buffers that MLX commits."""

import itertools
import re
from pathlib import Path

import mlx.core as mx
import pytest

from bench.graph_dispatches import KERNEL, VIEWS, kernel_in_graph
from bench.graph_launches import MLX_LIMITS, command_buffers, expert_layer, k2_config, launch_sizes, num_launches
from mlx_k2.kernels import variants
from mlx_k2.kernels.reference import RouterRule
from mlx_k2.kernels.stack import ExpertStack
from mlx_k2.kernels.tuning import DEFAULT
from mlx_k2.model import decoder_layer
from mlx_k2.model.batch import Batch, Span
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import AttentionWeights, DenseWeights, LayerWeights, LowRankQuery, MoeWeights
from mlx_k2.stage.mlx_settings import LONG_BUFFERS, BufferLimits

pytestmark = pytest.mark.timeout(60)

CONFIG = k2_config()


def zeros(shape: tuple[int, ...], dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    """Return an evaluated array of zeros that uses the memory of one element."""
    array = mx.broadcast_to(mx.zeros(1, dtype), shape)
    mx.eval(array)
    return array


def layer_weights() -> LayerWeights:
    """Return the weights of an expert layer, in the shapes of the table."""
    nodes = {node.name: node for node in expert_layer(CONFIG)}

    def matrix(name: str) -> mx.array:
        return zeros(nodes[name].matrices[0])

    shapes = nodes["experts gate and up"].arrays + nodes["experts down"].arrays
    dtypes = itertools.cycle((mx.uint32, mx.bfloat16))  # packed weights and their scales alternate
    stack = ExpertStack(*map(zeros, shapes, dtypes))
    hidden_norm = zeros((CONFIG.hidden_size,))
    query = LowRankQuery(matrix("q_a"), zeros((CONFIG.q_lora_rank or 0,)), matrix("q_b"))
    latent_norm = zeros((CONFIG.kv_lora_rank,))
    attention = AttentionWeights(
        query, matrix("kv_a"), latent_norm, matrix("keys up"), matrix("values up"), matrix("output")
    )
    shared = DenseWeights(matrix("shared gate"), matrix("shared up"), matrix("shared down"))
    bias = zeros((CONFIG.n_routed_experts,), mx.float32)
    moe = MoeWeights(zeros(nodes["router logits"].arrays[0]), bias, stack, shared)
    return LayerWeights(hidden_norm, attention, hidden_norm, moe)


def use_graph_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace each operation that is one node on a GPU, and several or missing on a CPU, by one node."""

    def one_node(x: mx.array, *inputs: mx.array) -> mx.array:
        node: mx.array = mx.depends([zeros(x.shape, x.dtype)], [x, *inputs])[0]
        return node

    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, weight, _eps: one_node(x, weight))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *_, offset, **__: one_node(x, offset))
    monkeypatch.setattr(
        decoder_layer,
        "routed_experts",
        lambda x, ids, weights, stack: variants.decode_experts(x, ids, weights, stack, DEFAULT, kernel_in_graph),
    )

    def route(hidden: mx.array, router: mx.array, bias: mx.array, rule: RouterRule) -> tuple[mx.array, mx.array]:
        return variants.route(hidden, router, bias, rule, kernel_in_graph)

    monkeypatch.setattr(decoder_layer, "route", route)


def test_the_table_has_the_nodes_of_a_layers_graph_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_graph_of_a_gpu(monkeypatch)
    num_cached = 255
    cache = LatentCache(
        num_layers=1, num_slots=1, context_tokens=num_cached + 1, row_dim=CONFIG.cache_row_dim, dtype=mx.bfloat16
    )
    prompt = Span(slot=0, position=0, count=num_cached, is_prompt=True)
    cache.write(0, prompt, zeros((num_cached, CONFIG.cache_row_dim)))
    batch = Batch([Span(slot=0, position=num_cached, count=1, is_prompt=False)])
    mx.eval(cache.arrays, batch.positions)
    mx.enable_compile()  # an earlier test of this process may have disabled it, as a stage on a CPU does
    layer = decoder_layer.DecoderLayer(CONFIG)
    output = layer.run(zeros((1, CONFIG.hidden_size)), 0, layer_weights(), batch, cache)
    mx.export_to_dot(str(tmp_path / "graph.dot"), output)
    labels = re.findall(r"\[label =\"([^\"]*)\", shape=rectangle\]", (tmp_path / "graph.dot").read_text())
    primitives = [node.primitive for node in expert_layer(CONFIG)]
    expected = [KERNEL if primitive in ("Kernel", "RMSNorm", "RoPE") else primitive for primitive in primitives]
    assert [label for label in labels if label not in VIEWS] == expected


def test_an_expert_layer_has_33_launches_and_a_node_with_several_launches_names_mlxs_source() -> None:
    layer = expert_layer(CONFIG)
    assert num_launches(layer) == 33
    assert all(".cpp" in node.rule for node in layer if node.num_launches > 1)


@pytest.mark.parametrize(
    ("dense_bits", "limits", "num_buffers"),
    [(None, MLX_LIMITS, 239), (8, MLX_LIMITS, 120), (None, LONG_BUFFERS, 19), (8, LONG_BUFFERS, 19)],
)
def test_long_buffers_and_quantized_dense_matrices_reduce_the_command_buffers_of_a_token(
    dense_bits: int | None, limits: BufferLimits, num_buffers: int
) -> None:
    assert command_buffers(launch_sizes(CONFIG, dense_bits), limits) == num_buffers


def test_a_command_buffer_ends_after_the_operation_that_passes_a_limit() -> None:
    limits = BufferLimits(operations=100, megabytes=50)
    assert command_buffers([0] * 303, limits) == 3  # of 101 operations each
    assert command_buffers([51 << 20, 0, 50 << 20, 1 << 20, 0], limits) == 2
