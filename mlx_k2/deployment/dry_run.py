"""Plan of a deployment: a preview before any host is contacted, and the plan from the memory that all hosts report."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import msgspec
import psutil

from mlx_k2.deployment.cluster_options import DeploymentRequest, source_on
from mlx_k2.deployment.plan import DEFAULT_CONTEXT_TOKENS, HostMemory, RunShape, StagePlan, choose_shape, plan_stages
from mlx_k2.errors import PartitionError, RequestError
from mlx_k2.weights.checkpoint import ModelDescription, locate_tensors
from mlx_k2.weights.draft_head import stage_specs
from mlx_k2.weights.model_source import is_repo, model_folder

MAX_HALVINGS = 8
"""A context of less than 1/128 of what was asked for is not proposed."""
_IS_MAC = sys.platform == "darwin"


def preview(request: DeploymentRequest, model: ModelDescription) -> tuple[RunShape, tuple[StagePlan, ...]]:
    """Return the plan of ``deploy``, as far as it is known before any host is contacted.

    Raises:
        SetupError: the deployment would be rejected. The files of stages on this machine are checked too.
    """
    hosts = request.hostfile.hosts
    here = HostMemory(None, psutil.virtual_memory().total)
    unknown = HostMemory(None, None)
    all_on_gpu = _IS_MAC or not any(host.is_local for host in hosts)  # other hosts are assumed to be Macs
    memories = [here if host.is_local else unknown for host in hosts]
    shape, plans = plan_for(request, model, memories, all_on_gpu=all_on_gpu)
    for plan in plans:
        source = source_on(plan.host, request.source)
        if plan.host.is_local and not is_repo(source):
            layers = plan.assignment.first_layer, plan.assignment.end_layer
            locate_tensors(model_folder(source), model.index, stage_specs(model.config, *layers, model.draft))
    return shape, plans


def plan_for(
    request: DeploymentRequest, model: ModelDescription, memories: Sequence[HostMemory], *, all_on_gpu: bool
) -> tuple[RunShape, tuple[StagePlan, ...]]:
    """Return the requested shape and its stages. Halve the number of slots until the stages fit.

    Raises:
        PartitionError: nothing fits; names the options that make it fit, if there are any.
    """
    num_slots = request.num_slots
    while True:
        try:
            return _planned(replace(request, num_slots=num_slots), model, memories, all_on_gpu)
        except PartitionError as error:
            if num_slots == 1:
                hints = _hints(request, model, memories, all_on_gpu)
                raise PartitionError(", or ".join([str(error), *hints])) from None
            num_slots //= 2


def _planned(
    request: DeploymentRequest, model: ModelDescription, memories: Sequence[HostMemory], all_on_gpu: bool
) -> tuple[RunShape, tuple[StagePlan, ...]]:
    shape = choose_shape(model.config, request.options, request.num_slots, all_on_gpu)
    return shape, plan_stages(model, request.hostfile, memories, request.options.split, shape, request.draft_head)


def _hints(
    request: DeploymentRequest, model: ModelDescription, memories: Sequence[HostMemory], all_on_gpu: bool
) -> list[str]:
    """Return the options that each make the model fit without the others, each with its smallest change."""
    options = request.options
    context = options.context_tokens or min(DEFAULT_CONTEXT_TOKENS, model.config.max_position_embeddings)
    changes: list[tuple[str, dict[str, Any]]] = [("leave --split out", {"split": None})] if options.split else []
    smaller = [context >> halvings for halvings in range(1, MAX_HALVINGS) if context >> halvings > 1]
    changes += [(f"give --context {tokens}", {"context_tokens": tokens}) for tokens in smaller]
    changes += [(f"give --dense-bits {bits}", {"dense_bits": bits}) for bits in (8, 4)]
    if (head := request.draft_head) is not None:
        smaller_heads = [msgspec.structs.replace(head, bits=bits) for bits in (8, 4)]
        changes += [(f"give --draft-bits {smaller.bits}", {"draft_head": smaller}) for smaller in smaller_heads]
        changes.append(("leave --draft-model out", {"draft_head": None}))
    found: dict[str, str] = {}
    for hint, change in changes:
        option = hint.split()[1]
        with suppress(PartitionError, RequestError):
            if option not in found:
                changed_head = change.pop("draft_head", request.draft_head)
                changed = replace(request.with_options(**change), num_slots=1, draft_head=changed_head)
                _planned(changed, model, memories, all_on_gpu)
                found[option] = hint
    return list(found.values())
