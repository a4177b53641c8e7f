"""Tests of planning with a draft head: its bytes, its time, and the error if it does not fit."""

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
from tests.deployment.test_plan import GB, K2_THINKING, SHAPE, studios

HEAD = DraftHead(source=ModelSource(path_or_repo="nvidia/head"), bits=8)
AUX_LAYERS = [1, 29, 57]
"""The layers whose outputs the head reads: two on the first stage, one on the second."""


def with_head(vocab_size: int | None = None) -> ModelDescription:
    """Return Kimi K2 Thinking with a head that shares the embedding."""
    fields = draft_config_fields(
        thinking_config_fields(), eagle_config={"eagle_aux_hidden_state_layer_ids": AUX_LAYERS}
    )
    names = dict.fromkeys((LM_HEAD, "layers.0.hidden_norm.weight"), SINGLE_FILE_NAME)
    files = {CONFIG_NAME: json.dumps(fields).encode(), INDEX_NAME: json.dumps({"weight_map": names}).encode()}
    head = msgspec.structs.replace(HEAD, vocab_size=vocab_size)
    return replace(K2_THINKING, draft=describe_draft(files, head, K2_THINKING.config, check_names=False))


def plan(model: ModelDescription, memory_gb: float, head: DraftHead | None = HEAD) -> tuple[StagePlan, ...]:
    memory = HostMemory(int(memory_gb * GB), 512 * GB)
    return plan_stages(model, studios(2), [memory] * 2, (32, 29), SHAPE, head)


def test_a_heads_slices_are_on_the_stages_of_their_layers_and_the_rest_on_the_last() -> None:
    model = with_head()
    assert model.draft is not None
    plain, drafting = plan(model, 460, None), plan(model, 460)
    added = [with_head.shard_bytes - without.shard_bytes for with_head, without in zip(drafting, plain, strict=True)]
    slice_bytes = model.draft.slice_bytes(2, 8)
    head_bytes = model.draft.layer_bytes(2, 8) + model.draft.projection_bytes(2, 8) + model.draft.embedding_bytes(2)
    assert added == [2 * slice_bytes, slice_bytes + head_bytes]
    assert sum(added) / GB == pytest.approx(1.96 + 2.35, abs=0.01)  # the head's matrices, the target's embedding
    cache_bytes = 576 * 2 * SHAPE.context_tokens
    needed = [with_head.needed_bytes - without.needed_bytes for with_head, without in zip(drafting, plain, strict=True)]
    assert needed == [added[0], added[1] + cache_bytes]
    assert "ends.safetensors" in drafting[1].files  # the target's embedding


def test_a_head_moves_layers_to_the_first_stage() -> None:
    memories = [HostMemory(460 * GB, 512 * GB)] * 2
    plain, drafting = (plan_stages(with_head(), studios(2), memories, None, SHAPE, head) for head in (None, HEAD))
    assert drafting[0].assignment.num_layers > plain[0].assignment.num_layers


def test_the_last_stages_cost_has_the_time_of_a_draft() -> None:
    model = with_head()
    shape = replace(SHAPE, dense_bits=8)
    stages = [replace(stage, host=msgspec.structs.replace(stage.host, gb_per_s=692)) for stage in plan(model, 460)]
    costs = [stage_cost(model, stage, shape, HEAD, on_gpu=True) for stage in stages]
    assert costs[0].draft_s == 0
    slices_s = 3 * 7168**2 * 1.0625 / 692e9
    assert costs[1].draft_s + slices_s == pytest.approx(2.8e-3, rel=0.1)


@follows_advice(
    "give --draft-bits 8",
    "leave --draft-model out",
)
@pytest.mark.slow
def test_a_head_that_does_not_fit_names_the_options_that_make_it_fit() -> None:
    head = msgspec.structs.replace(HEAD, bits=None)
    needed = [stage.needed_bytes for stage in plan(with_head(), 460, head)]
    options = ClusterOptions(split=(32, 29), context_tokens=32768)
    request = DeploymentRequest(options, studios(2), ModelSource(path_or_repo="k2"), draft_head=head)
    memories = [HostMemory(460 * GB, 512 * GB), HostMemory(needed[1] - GB, 512 * GB)]
    with pytest.raises(PartitionError, match="give --draft-bits 8, or leave --draft-model out"):
        plan_for(request, with_head(), memories, all_on_gpu=True)
    for advised in (HEAD, None):
        _, plans = plan_for(replace(request, draft_head=advised), with_head(), memories, all_on_gpu=True)
        assert plans[1].needed_bytes <= needed[1] - GB


def test_a_head_for_one_stage_is_refused() -> None:
    options = ClusterOptions(num_stages=1, draft_model="nvidia/head")
    with pytest.raises(RequestError, match="--draft-model is for two stages or more"):
        open_source(deployment_request(options))
    with pytest.raises(RequestError, match="--draft model is for two stages or more"):
        deployment_request(ClusterOptions(num_stages=1), draft_mode=DraftMode.MODEL)


@pytest.mark.parametrize("options", [{"draft_aux": (1, 2, 3)}, {"draft_bits": 4}, {"draft_vocab": 1000}])
def test_options_of_a_draft_model_without_one_are_refused(options: dict[str, Any]) -> None:
    ClusterOptions(**options)  # the built-in model has a draft head
    ClusterOptions(model="k2", draft_model="nvidia/head", **options)
    with pytest.raises(RequestError, match="give --draft-model"):
        ClusterOptions(model="k2", **options)
