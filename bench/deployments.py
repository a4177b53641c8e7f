"""Local deployments of the benchmarks' checkpoints."""

from contextlib import AbstractContextManager
from pathlib import Path

from bench.checkpoints import CONTEXT_TOKENS
from mlx_k2.cluster.hostfile import local_hostfile
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest, open_source
from mlx_k2.deployment.deploy import Deployment, deploy
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.weights.checkpoint import describe_model, read_small_files
from mlx_k2.weights.model_source import DraftHead, ModelSource


def local_deployment(
    folder: Path, num_stages: int, num_slots: int = 1, head: DraftHead | None = None
) -> AbstractContextManager[Deployment]:
    """Start ``num_stages`` stages with equal numbers of layers on this machine, in float32; stop them on exit."""
    model = describe_model(read_small_files(folder), str(folder))
    num_layers = model.config.num_hidden_layers
    assert num_layers % num_stages == 0, f"{num_layers} layers cannot be divided equally over {num_stages} stages"
    source, split = ModelSource(path_or_repo=str(folder)), (num_layers // num_stages,) * num_stages
    options = ClusterOptions(split=split, context_tokens=CONTEXT_TOKENS, dtype="float32")
    request = DeploymentRequest(options, local_hostfile(num_stages), source, num_slots, head)
    return deploy(*open_source(request), DeploymentListener())
