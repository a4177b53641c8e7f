"""What is to be deployed, as the user asked for it."""

from dataclasses import dataclass

from mlx_k2.cluster.hostfile import Host, Hostfile
from mlx_k2.launch.group import STALL_TIMEOUT_S
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.weights.model_source import ModelSource


@dataclass(frozen=True)
class DeploymentRequest:
    """What the user asked for; None leaves the choice to the program."""

    hostfile: Hostfile
    source: ModelSource
    split: tuple[int, ...] | None
    context_tokens: int | None
    dtype: str | None
    lease_s: float
    stall_timeout_s: float = STALL_TIMEOUT_S
    """How long a stopped stage, a silent host or a stuck hop is waited for."""
    num_slots: int = 1
    """How many sequences may run at once; fewer do where the caches of so many do not fit."""
    dense_bits: int | None = None
    """Of attention, shared experts, dense layers and head; None leaves them as the checkpoint has them."""


def stage_location(host: Host) -> StageLocation:
    """Where a host's stage is started, and with which Python."""
    return StageLocation(ssh=None if host.is_local else host.ssh, python=host.python)


def source_on(host: Host, source: ModelSource) -> ModelSource:
    """Where ``host`` has the model: a host may keep it in another folder."""
    return source if host.model is None else ModelSource(path_or_repo=host.model, revision=None)
