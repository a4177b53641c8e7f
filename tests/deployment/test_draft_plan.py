"""Tests of plans with a draft head: its bytes, its time, and the errors about heads and their options."""

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest, deployment_request, open_source
from mlx_k2.deployment.dry_run import plan_for
from mlx_k2.deployment.plan import HostMemory, StagePlan, plan_stages
from mlx_k2.deployment.stage_costs import stage_cost
from mlx_k2.errors import PartitionError, RequestError
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.testing.random_draft_head import draft_config_fields
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.draft_head import LM_HEAD, describe_draft
from mlx_k2.weights.index import CONFIG_NAME, INDEX_NAME, SINGLE_FILE_NAME
from mlx_k2.weights.known_layout import thinking_config_fields
from mlx_k2.weights.model_source import DraftHead, ModelSource
from tests.advice import follows_advice
from tests.deployment.test_plan import GB, K2_THINKING, SHAPE, STUDIO, studios

HEAD = DraftHead(source=ModelSource(path_or_repo="nvidia/head"), bits=8)
STUDIOS = [STUDIO] * 2
SPLIT = (32, 29)


def k2_with_head(**changes: int) -> ModelDescription:
    """Return Kimi K2 Thinking with a head that uses the target's embedding and reads the layers 1, 29 and 57.

    ``changes`` are fields of the head's config.
    """
    eagle_config = {"eagle_aux_hidden_state_layer_ids": [1, 29, 57]}
    fields = draft_config_fields(thinking_config_fields(), eagle_config=eagle_config, **changes)
    # The index says only where the layer is, and that the head has its own output projection.
    weight_map = dict.fromkeys((LM_HEAD, "layers.0.hidden_norm.weight"), SINGLE_FILE_NAME)
    files = {CONFIG_NAME: json.dumps(fields).encode(), INDEX_NAME: json.dumps({"weight_map": weight_map}).encode()}
    return replace(K2_THINKING, draft=describe_draft(files, HEAD, K2_THINKING.config, check_names=False))


def plan(head: DraftHead | None) -> tuple[StagePlan, ...]:
    return plan_stages(k2_with_head(), studios(2), STUDIOS, SPLIT, SHAPE, head)


def test_the_slices_of_a_head_are_on_the_stages_of_their_layers_and_the_rest_on_the_last_stage() -> None:
    draft = k2_with_head().draft
    assert draft is not None
    stages_without, stages_with = plan(None), plan(HEAD)
    pairs = list(zip(stages_without, stages_with, strict=True))
    compute_bytes, bits = 2, 8  # of SHAPE's dtype, and of HEAD
    slice_bytes = draft.slice_bytes(compute_bytes, bits)
    rest_bytes = (
        draft.layer_bytes(compute_bytes, bits)
        + draft.projection_bytes(compute_bytes, bits)
        + draft.embedding_bytes(compute_bytes)
    )
    shard_bytes = [with_head.shard_bytes - without.shard_bytes for without, with_head in pairs]
    assert shard_bytes == [2 * slice_bytes, slice_bytes + rest_bytes]
    assert sum(shard_bytes) / GB == pytest.approx(4.31, abs=0.01)
    needed_bytes = [with_head.needed_bytes - without.needed_bytes for without, with_head in pairs]
    cache_bytes = 576 * compute_bytes * SHAPE.context_tokens  # 576 values for each position of the head's only layer
    assert needed_bytes == [shard_bytes[0], shard_bytes[1] + cache_bytes]
    assert "ends.safetensors" in stages_with[1].files  # the target's embedding


def test_the_cache_of_a_head_is_no_part_of_its_shard_if_it_is_smaller_than_the_cache_of_a_layer() -> None:
    model = k2_with_head(kv_lora_rank=256)
    short, long = (
        plan_stages(model, studios(2), STUDIOS, SPLIT, replace(SHAPE, context_tokens=context_tokens), HEAD)[1]
        for context_tokens in (4096, 8192)
    )
    assert short.shard_bytes == long.shard_bytes


def test_with_a_head_the_first_stage_gets_more_layers() -> None:
    without, with_head = (
        plan_stages(k2_with_head(), studios(2), STUDIOS, None, SHAPE, head)[0].assignment.num_layers
        for head in (None, HEAD)
    )
    assert with_head > without


def test_the_cost_of_the_last_stage_has_the_time_of_a_draft() -> None:
    shape = replace(SHAPE, dense_bits=8)
    stages = [replace(stage, host=msgspec.structs.replace(stage.host, gb_per_s=692)) for stage in plan(HEAD)]
    first, last = (stage_cost(k2_with_head(), stage, shape, HEAD, on_gpu=True) for stage in stages)
    assert first.draft_s == 0
    slices_s = 3 * 7168**2 * 1.0625 / 692e9  # three square matrices of 8.5 bits per weight
    read_bytes = 1.96e9  # the head's layer, output projection and slices
    assert last.draft_s + slices_s == pytest.approx(read_bytes / 692e9, rel=0.1)


@follows_advice(
    "give --draft-bits 8",
    "leave --draft-model out",
)
@pytest.mark.slow
def test_the_error_about_a_head_that_does_not_fit_names_the_options_that_make_it_fit() -> None:
    unquantized_head = msgspec.structs.replace(HEAD, bits=None)
    options = ClusterOptions(split=SPLIT, context_tokens=32768)
    request = DeploymentRequest(options, studios(2), ModelSource(path_or_repo="k2"), draft_head=unquantized_head)
    available_bytes = plan(unquantized_head)[1].needed_bytes - GB
    memories = [STUDIO, HostMemory(working_set_bytes=available_bytes, ram_bytes=512 * GB)]
    with pytest.raises(PartitionError, match="give --draft-bits 8, or leave --draft-model out"):
        plan_for(request, k2_with_head(), memories, all_on_gpu=True)
    for advised_head in (HEAD, None):
        _, plans = plan_for(replace(request, draft_head=advised_head), k2_with_head(), memories, all_on_gpu=True)
        assert plans[1].needed_bytes <= available_bytes


def test_a_head_for_a_single_stage_is_refused() -> None:
    options = ClusterOptions(num_stages=1, draft_model="nvidia/head")
    with pytest.raises(RequestError, match="--draft-model is for two stages or more"):
        open_source(deployment_request(options))
    with pytest.raises(RequestError, match="--draft model is for two stages or more"):
        deployment_request(ClusterOptions(num_stages=1), draft_mode=DraftMode.MODEL)


@pytest.mark.parametrize("option", [{"draft_aux": (1, 2, 3)}, {"draft_bits": 4}, {"draft_vocab": 1000}])
def test_an_option_of_draft_models_is_refused_for_a_model_without_one(option: dict[str, Any]) -> None:
    ClusterOptions(**option)  # the built-in model has a draft head
    ClusterOptions(model="k2", draft_model="nvidia/head", **option)
    with pytest.raises(RequestError, match="give --draft-model"):
        ClusterOptions(model="k2", **option)
