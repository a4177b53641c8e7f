"""Tests of NaN and infinity: in the tensors that are checked while loading, and in those that a step uses."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_k2.errors import CheckpointError, NotFinite
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.weights.index import CheckpointIndex, read_index_json
from mlx_k2.weights.reader import ShardReader
from tests.model.checkpoints import Checkpoint, planted, read_config
from tests.stage.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("as_a_stage_on_a_cpu")

NAN, INFINITY = 0x7FC0, 0x7F80
"""As bfloat16, and as the upper half of a float32."""
ROW = Row(0, 0, (5, 6, 7), True, Sampling(seed=1, temperature=0))
ALWAYS_CHECKED = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.3.post_attention_layernorm.weight",
    "model.layers.2.self_attn.q_a_layernorm.weight",
    "model.layers.2.self_attn.kv_a_layernorm.weight",
    "model.layers.4.mlp.gate.weight",
    "model.layers.4.mlp.gate.e_score_correction_bias",
    "model.layers.5.mlp.experts.13.gate_proj.weight_scale",
    "model.layers.5.mlp.experts.0.down_proj.weight_scale",
)
USED_BY_A_STEP = {
    "model.layers.0.self_attn.q_a_proj.weight": "layer 0",
    "model.layers.1.self_attn.q_b_proj.weight": "layer 1",
    "model.layers.2.self_attn.kv_a_proj_with_mqa.weight": "layer 2",
    "model.layers.3.self_attn.kv_b_proj.weight": "layer 3",
    "model.layers.4.self_attn.o_proj.weight": "layer 4",
    "model.layers.0.mlp.up_proj.weight": "layer 0",
    "model.layers.6.mlp.shared_experts.down_proj.weight": "layer 6",
    "lm_head.weight": "the head",
}


def load_all(folder: Path, *, check_all: bool) -> None:
    config = read_config(folder)
    index = CheckpointIndex.from_json(read_index_json(folder), str(folder))
    files = {name: folder / file for name, file in index.weight_map.items()}
    reader = ShardReader(config, files, mx.bfloat16, check_all=check_all)
    reader.embedding()
    for layer in range(config.num_hidden_layers):
        reader.layer(layer)
    reader.head()


@pytest.mark.parametrize("value", [NAN, INFINITY], ids=["NaN", "infinity"])
@pytest.mark.parametrize("name", ALWAYS_CHECKED)
def test_a_tensor_that_is_always_checked_is_refused_by_file_and_name(
    checkpoint: Checkpoint, tmp_path: Path, name: str, value: int
) -> None:
    folder = planted(checkpoint("thinking"), tmp_path / "model", name, value)
    with pytest.raises(CheckpointError, match=rf"\.safetensors: {name} has NaN or infinity: fetch the file again"):
        load_all(folder, check_all=False)


@pytest.mark.parametrize("value", [NAN, INFINITY], ids=["NaN", "infinity"])
@pytest.mark.parametrize("name", USED_BY_A_STEP)
def test_check_weights_refuses_every_other_tensor(
    checkpoint: Checkpoint, tmp_path: Path, name: str, value: int
) -> None:
    folder = planted(checkpoint("thinking"), tmp_path / "model", name, value)
    load_all(folder, check_all=False)
    with pytest.raises(CheckpointError, match=rf"\.safetensors: {name} has NaN or infinity: fetch the file again"):
        load_all(folder, check_all=True)


@pytest.mark.parametrize("value", [NAN, INFINITY], ids=["NaN", "infinity"])
@pytest.mark.parametrize(("name", "origin"), USED_BY_A_STEP.items())
def test_a_step_that_uses_the_tensor_names_the_first_layer_and_gives_no_token(
    checkpoint: Checkpoint, tmp_path: Path, name: str, origin: str, value: int
) -> None:
    pipeline = Pipeline(planted(checkpoint("thinking"), tmp_path / "model", name, value), 3)
    with pytest.raises(NotFinite, match=rf"NaN or infinity in step 1, first in {origin}: its weights"):
        pipeline.step(ROW)


def test_the_sum_of_large_finite_values_is_finite() -> None:
    values = mx.array(np.full((2048, 7168), 1e20, np.float32)).astype(mx.bfloat16)
    assert np.isfinite(mx.sum(values).item())
