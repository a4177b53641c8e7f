"""Plan of a deployment: a preview before any host is contacted, and the plan from the memory that all hosts report."""

import sys
from collections.abc import Sequence

import psutil

from mlx_k2.deployment.deployment_request import DeploymentRequest, source_on
from mlx_k2.deployment.plan import HostMemory, RunShape, StagePlan, choose_shape, plan_stages
from mlx_k2.errors import PartitionError
from mlx_k2.weights.checkpoint import ModelDescription, locate_tensors
from mlx_k2.weights.inventory import shard_specs
from mlx_k2.weights.model_source import is_repo, model_folder

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
            specs = shard_specs(model.config, plan.assignment.first_layer, plan.assignment.end_layer)
            locate_tensors(model_folder(source), model.index, specs)
    return shape, plans


def plan_for(
    request: DeploymentRequest, model: ModelDescription, memories: Sequence[HostMemory], *, all_on_gpu: bool
) -> tuple[RunShape, tuple[StagePlan, ...]]:
    """Return the requested shape and its stages. Halve the number of slots until the stages fit."""
    num_slots = request.num_slots
    while True:
        shape = choose_shape(
            model.config, request.dtype, request.context_tokens, num_slots, all_on_gpu, request.dense_bits
        )
        try:
            return shape, plan_stages(model, request.hostfile, memories, request.split, shape)
        except PartitionError:
            if num_slots == 1:
                raise
            num_slots //= 2
