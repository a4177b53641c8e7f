"""The steps from options to started stages that several commands share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from mlx_k2.cli.console import ConsoleListener, log
from mlx_k2.cli.options import RunOptions
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest, deployment_request
from mlx_k2.deployment.dry_run import preview
from mlx_k2.deployment.restarting import RestartingDeployment
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_frontend import ModelFrontend


def prepare_request(
    cluster: ClusterOptions, draft_mode: DraftMode = DraftMode.AUTO, num_slots: int = 1
) -> DeploymentRequest:
    """Return the request for a deployment, and log its warnings; raise the errors of `deployment_request`."""
    request = deployment_request(cluster, num_slots, draft_mode)
    for line in request.hostfile.warnings:
        log(line)
    return request


def frontend_before_start(request: DeploymentRequest, model: ModelDescription | None) -> ModelFrontend | None:
    """Return the model's frontend, which checks prompts before any stage is started; None without ``model``.

    Raises:
        SetupError: the deployment would be rejected.
    """
    return None if model is None else ModelFrontend(model, preview(request, model)[0].context_tokens)


class StartedCluster(NamedTuple):
    """Stages that are ready, and the frontend of their model."""

    stages: RestartingDeployment
    frontend: ModelFrontend


@contextmanager
def started_cluster(
    request: DeploymentRequest, model: ModelDescription | None, run: RunOptions, *, verbose: bool
) -> Iterator[StartedCluster]:
    """Start the stages and load the model, with progress on stderr; end them on exit."""
    with (
        ConsoleListener(verbose) as listener,
        RestartingDeployment(request, model, listener, run.restarts, run.log_dir, run.log_tokens) as stages,
    ):
        listener.hide_progress()
        deployment = stages.deployment
        yield StartedCluster(stages, ModelFrontend(deployment.model, deployment.shape.context_tokens))
