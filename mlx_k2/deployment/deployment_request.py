"""The user's request for a deployment, and each host's location and model source."""

import shlex
from dataclasses import dataclass

from mlx_k2.cluster.hostfile import Host, Hostfile
from mlx_k2.launch.group import STALL_TIMEOUT_S
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.weights.model_source import BUILTIN, ModelSource


@dataclass(frozen=True)
class DeploymentRequest:
    """Options of a deployment as the user set them. None leaves the choice to the program."""

    hostfile: Hostfile
    source: ModelSource
    split: tuple[int, ...] | None
    context_tokens: int | None
    dtype: str | None
    lease_s: float
    stall_timeout_s: float = STALL_TIMEOUT_S
    """Maximum time that a stage may be stopped, a host silent or a hop stuck."""
    num_slots: int = 1
    """Maximum number of sequences that run at once. It is reduced if their caches do not fit."""
    dense_bits: int | None = None
    """Bits per weight of attention, shared experts, dense layers and head. None keeps the checkpoint's format."""
    hostfile_path: str | None = None
    """The path of the hostfile for commands that are shown; None for stages on this machine alone."""
    check_weights: bool = False
    """Whether to search all tensors for NaN and infinity while loading."""
    address: str | None = None
    """The URL at which clients reach the model, for the users of other commands; None if there is no server."""

    def command_line(self, command: str) -> str:
        """Return the line for a shell that runs another command of mlx-k2 with the same hosts, model and layers."""
        given = {
            "--hostfile": self.hostfile_path,
            "--stages": None if self.hostfile_path else len(self.hostfile.hosts),
            "--model": None if self.source.path_or_repo == BUILTIN else self.source.path_or_repo,
            "--revision": self.source.revision,
            "--split": None if self.split is None else ",".join(map(str, self.split)),
        }
        options = [f" {name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None]
        return f"mlx-k2 {command}{''.join(options)}"


def stage_location(host: Host) -> StageLocation:
    """Return where a host's stage is started, and with which Python."""
    return StageLocation(ssh=None if host.is_local else host.ssh, python=host.python)


def source_on(host: Host, source: ModelSource) -> ModelSource:
    """Return where ``host`` has the model. A host may have it in another folder."""
    return source if host.model is None else ModelSource(path_or_repo=host.model, revision=None)
