"""Plan of a deployment: a preview before any host is contacted, and the plan for the memory that all hosts report."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import msgspec
import psutil

from mlx_k2.deployment.cluster_options import DeploymentRequest, source_on
from mlx_k2.deployment.plan import DEFAULT_CONTEXT_TOKENS, HostMemory, RunShape, StagePlan, choose_shape, plan_stages
from mlx_k2.errors import PartitionError, RequestError
from mlx_k2.weights.checkpoint import ModelDescription, locate_tensors
from mlx_k2.weights.draft_head import stage_specs
from mlx_k2.weights.model_source import is_repo, model_folder

MAX_HALVINGS = 7  # contexts down to 1/128 of the requested one are proposed
_IS_MAC = sys.platform == "darwin"


def preview(request: DeploymentRequest, model: ModelDescription) -> tuple[RunShape, tuple[StagePlan, ...]]:
    """Return the plan of ``deploy``, as far as it is known before any host is contacted.

    Raises:
        SetupError: the deployment would be rejected. If the model is a folder, the files of this machine's stages are
            checked too.
    """
    hosts = request.hostfile.hosts
    here = HostMemory(working_set_bytes=None, ram_bytes=psutil.virtual_memory().total)
    unknown = HostMemory(working_set_bytes=None, ram_bytes=None)
    all_on_gpu = _IS_MAC or not any(host.is_local for host in hosts)  # other hosts are assumed to be Macs
    memories = [here if host.is_local else unknown for host in hosts]
    shape, plans = plan_for(request, model, memories, all_on_gpu=all_on_gpu)
    for plan in plans:
        source = source_on(plan.host, request.source)
        if plan.host.is_local and not is_repo(source):  # locate_tensors raises if a tensor is missing
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
    """Return the changes that make the model fit, each of one option: for each option the smallest such change."""
    options, head = request.options, request.draft_head
    context = options.context_tokens or min(DEFAULT_CONTEXT_TOKENS, model.config.max_position_embeddings)
    changes: list[tuple[str, DeploymentRequest]] = []
    if options.split:
        changes.append(("leave --split out", request.with_options(split=None)))
    contexts = [context >> halvings for halvings in range(1, MAX_HALVINGS + 1) if context >> halvings > 1]
    changes += [(f"give --context {tokens}", request.with_options(context_tokens=tokens)) for tokens in contexts]
    changes += [(f"give --dense-bits {bits}", request.with_options(dense_bits=bits)) for bits in (8, 4)]
    if head is not None:
        for bits in (8, 4):
            smaller_head = msgspec.structs.replace(head, bits=bits)
            changes.append((f"give --draft-bits {bits}", replace(request, draft_head=smaller_head)))
        changes.append(("leave --draft-model out", replace(request, draft_head=None)))
    hints: dict[str, str] = {}
    for hint, changed_request in changes:
        option = hint.split()[1]  # the hints for one option come with the smallest change first
        if option not in hints:
            with suppress(PartitionError, RequestError):
                _planned(replace(changed_request, num_slots=1), model, memories, all_on_gpu)
                hints[option] = hint
    return list(hints.values())
