"""Tests of NaN and infinity in tensors: found while loading, and in a step that uses the tensor."""

import re
from pathlib import Path

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from mlx_k2.errors import CheckpointError, NotFinite
from mlx_k2.kernels.stack import AffineStack
from mlx_k2.model.layer_weights import MoeWeights
from mlx_k2.protocol.messages import Load, Prepare
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.stage.loading import load_stage
from mlx_k2.stage.transport import Transport
from mlx_k2.token_mask import TokenMask
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.index import CheckpointIndex, read_index_json
from mlx_k2.weights.inventory import model_specs
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_source import ModelSource
from mlx_k2.weights.reader import ShardReader
from tests.advice import follows_advice
from tests.model.checkpoints import Checkpoint, copy_with_value, read_config
from tests.stage.pipeline import Pipeline

pytestmark = pytest.mark.usefixtures("as_a_stage_on_a_cpu")

NAN, INFINITY = 0x7FC0, 0x7F80
"""Bits of a bfloat16, which are the upper half of a float32."""
NUM_EXPERTS, EXPERTS_PER_TOKEN = 16, 4  # of the checkpoint "thinking"
ROW = Row(slot=0, position=0, token_ids=(5, 6, 7), is_prompt=True, sampling=Sampling(seed=1, temperature=0))
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
    "model.layers.3.mlp.experts.7.up_proj.weight_scale",
    "model.layers.5.mlp.experts.0.down_proj.weight_scale",
)
CHECKED_BY_STEPS = {
    "model.layers.0.self_attn.q_a_proj.weight": "layer 0",
    "model.layers.1.self_attn.q_b_proj.weight": "layer 1",
    "model.layers.2.self_attn.kv_a_proj_with_mqa.weight": "layer 2",
    "model.layers.3.self_attn.kv_b_proj.weight": "layer 3",
    "model.layers.4.self_attn.o_proj.weight": "layer 4",
    "model.layers.0.mlp.gate_proj.weight": "layer 0",
    "model.layers.0.mlp.up_proj.weight": "layer 0",
    "model.layers.0.mlp.down_proj.weight": "layer 0",
    "model.layers.1.mlp.shared_experts.gate_proj.weight": "layer 1",
    "model.layers.2.mlp.shared_experts.up_proj.weight": "layer 2",
    "model.layers.6.mlp.shared_experts.down_proj.weight": "layer 6",
    "lm_head.weight": "the head",
}


def load_all(folder: Path, *, check_all: bool) -> None:
    """Read all tensors of a checkpoint. ``check_all`` is the option --check-weights."""
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
    folder = copy_with_value(checkpoint("thinking"), tmp_path / "model", name, value)
    with pytest.raises(CheckpointError, match=rf"\.safetensors: {name} has NaN or infinity: fetch the file again"):
        load_all(folder, check_all=False)


@follows_advice(
    "a: run with --check-weights, or `mlx-k2 doctor --deep` with the same --hostfile and --model",
)
@pytest.mark.slow
@pytest.mark.parametrize("value", [NAN, INFINITY], ids=["NaN", "infinity"])
@pytest.mark.parametrize("name", CHECKED_BY_STEPS)
def test_check_weights_refuses_every_other_tensor(
    checkpoint: Checkpoint, tmp_path: Path, name: str, value: int
) -> None:
    folder = copy_with_value(checkpoint("thinking"), tmp_path / "model", name, value)
    load_all(folder, check_all=False)
    with pytest.raises(CheckpointError, match=rf"\.safetensors: {name} has NaN or infinity: fetch the file again"):
        load_all(folder, check_all=True)


@pytest.mark.parametrize(
    ("first", "value"),
    [
        pytest.param(True, NAN, id="NaN as the first element"),
        pytest.param(True, INFINITY, id="infinity as the first element", marks=pytest.mark.slow),
        pytest.param(False, NAN, id="NaN as the last element", marks=pytest.mark.slow),
        pytest.param(False, INFINITY, id="infinity as the last element"),
    ],
)
@pytest.mark.parametrize(("name", "origin"), CHECKED_BY_STEPS.items())
def test_a_step_that_uses_the_tensor_names_the_first_layer_and_gives_no_token(
    checkpoint: Checkpoint, tmp_path: Path, name: str, origin: str, first: bool, value: int
) -> None:
    pipeline = Pipeline(copy_with_value(checkpoint("thinking"), tmp_path / "model", name, value, first=first), 3)
    with pytest.raises(NotFinite, match=rf"NaN or infinity in step 1, first in {origin}: its weights"):
        pipeline.step(ROW)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(seed=1, top_p=0.9, min_p=0.1, top_k=5, repetition_penalty=1.2, num_logprobs=3),
        Sampling(seed=1, temperature=0.5),
    ],
    ids=["filters", "temperature"],
)
def test_nan_in_the_logits_is_named_with_any_sampling_and_token_mask(
    checkpoint: Checkpoint, tmp_path: Path, sampling: Sampling
) -> None:
    pipeline = Pipeline(copy_with_value(checkpoint("thinking"), tmp_path / "model", "lm_head.weight", NAN), 2)
    mask = TokenMask.only([0])  # NaN is in the logit of the last token
    row = msgspec.structs.replace(ROW, sampling=sampling, recent_ids=(5, 6), token_mask=mask)
    with pytest.raises(NotFinite, match="first in the head"):
        pipeline.step(row)


def test_the_tests_above_plant_in_each_kind_of_float_tensor(checkpoint: Checkpoint) -> None:
    """A kind is a name without the numbers of layers and experts."""
    specs = model_specs(read_config(checkpoint("thinking")))
    kinds = {re.sub(r"\d+", "N", spec.name) for spec in specs if spec.dtype in ("BF16", "F32")}
    planted_kinds = {re.sub(r"\d+", "N", name) for name in (*ALWAYS_CHECKED, *CHECKED_BY_STEPS)}
    assert kinds == planted_kinds


@pytest.mark.parametrize("value", [NAN, INFINITY], ids=["NaN", "infinity"])
@pytest.mark.parametrize("name", CHECKED_BY_STEPS)  # the others are always checked
def test_dense_bits_check_every_tensor_because_mx_quantize_hides_nan(
    checkpoint: Checkpoint, tmp_path: Path, name: str, value: int
) -> None:
    folder = copy_with_value(checkpoint("thinking"), tmp_path / "model", name, value)
    source = ModelSource(path_or_repo=str(folder))
    description = describe_model(read_model_files(source).files, str(folder))
    prepare = Prepare(rank=0, num_stages=1, model=source, listen=())
    message = Load(
        first_layer=0,
        end_layer=description.config.num_hidden_layers,
        dtype="float32",
        num_slots=1,
        context_tokens=64,
        needed_bytes=0,
        dense_bits=8,
    )
    with pytest.raises(CheckpointError, match=rf"\.safetensors: {name} has NaN or infinity"):
        load_stage(description, prepare, message, Transport(), lambda _: None, lambda *_: None)


SAMPLING_WITH_LOGPROBS = Sampling(seed=1, temperature=0, num_logprobs=50)  # they show a change that keeps the token
ONE_TOKEN = Row(slot=0, position=0, token_ids=(5,), is_prompt=True, sampling=SAMPLING_WITH_LOGPROBS)


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["NaN", "infinity"])
@pytest.mark.parametrize("scale", ["gate_scale", "up_scale", "down_scale"])
def test_an_expert_broken_in_memory_is_named_by_a_step_that_uses_it_and_changes_no_other_step(
    checkpoint: Checkpoint, scale: str, value: float
) -> None:
    """A step uses an expert if its log-probabilities change when the expert's gate scales and biases are zero."""
    undamaged_tokens = Pipeline(checkpoint("thinking"), 2).tokens(ONE_TOKEN)
    used = set()
    for expert in range(NUM_EXPERTS):
        pipeline = Pipeline(checkpoint("thinking"), 2)
        experts = experts_of_layer_5(pipeline)
        gate_scale, gate_bias = mx.array(experts.experts.gate_scale), mx.array(experts.gate_bias)
        experts.experts.gate_scale[expert] = experts.gate_bias[expert] = 0.0
        is_used = pipeline.tokens(ONE_TOKEN) != undamaged_tokens  # step 1
        experts.experts.gate_scale[:], experts.gate_bias[:] = gate_scale, gate_bias
        getattr(experts.experts, scale)[expert, 0, 0] = value
        if is_used:
            used.add(expert)
            with pytest.raises(NotFinite, match="NaN or infinity in step 2, first in layer 5"):
                pipeline.tokens(ONE_TOKEN)
        else:
            assert pipeline.tokens(ONE_TOKEN) == undamaged_tokens
    assert len(used) == EXPERTS_PER_TOKEN


@pytest.mark.slow
def test_the_last_stage_checks_a_chunk_that_samples_nothing_also_beside_a_row_with_finite_logits(
    checkpoint: Checkpoint,
) -> None:
    """Some experts are used by the chunk only, so that NaN in them leaves the other row's logits finite."""
    chunk = msgspec.structs.replace(ROW, sampling=None)
    other = Row(slot=1, position=0, token_ids=(9,), is_prompt=True, sampling=Sampling(seed=1))
    experts_found: dict[tuple[Row, ...], set[int]] = {}
    for rows in ((other,), (chunk,), (other, chunk)):
        experts_found[rows] = set()
        for expert in range(NUM_EXPERTS):
            pipeline = Pipeline(checkpoint("thinking"), 2)
            experts_of_layer_5(pipeline).experts.gate_scale[expert] = np.nan
            try:
                pipeline.step(*rows)
            except NotFinite as error:
                assert "first in layer 5" in str(error)
                experts_found[rows].add(expert)
    assert len(experts_found[(other,)]) == EXPERTS_PER_TOKEN
    assert experts_found[(chunk,)] - experts_found[(other,)]
    assert experts_found[(other, chunk)] == experts_found[(other,)] | experts_found[(chunk,)]


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["NaN", "infinity"])
def test_a_broken_row_of_the_embedding_is_found_by_a_step_with_its_token_and_by_no_other(
    checkpoint: Checkpoint, value: float
) -> None:
    pipeline = Pipeline(checkpoint("thinking"), 2)
    undamaged_tokens = pipeline.tokens(ONE_TOKEN)
    embedding = pipeline.runners[0]._model.embedding
    assert embedding is not None
    embedding[6, 0] = value  # token 6 is in ROW, not in ONE_TOKEN
    assert pipeline.tokens(ONE_TOKEN) == undamaged_tokens
    with pytest.raises(NotFinite, match="NaN or infinity in step 3, first in the embedding"):
        pipeline.tokens(ROW)


def experts_of_layer_5(pipeline: Pipeline) -> AffineStack:
    """Return the routed experts of layer 5, which the second of two stages holds with layers 3 to 6."""
    feed_forward = pipeline.runners[1]._model._layers[2].feed_forward
    assert isinstance(feed_forward, MoeWeights) and isinstance(feed_forward.experts, AffineStack)
    return feed_forward.experts


def test_the_sum_by_which_values_are_checked_does_not_overflow() -> None:
    values = mx.array(np.full((2048, 7168), 1e20, np.float32)).astype(mx.bfloat16)
    assert np.isfinite(mx.sum(values).item())
