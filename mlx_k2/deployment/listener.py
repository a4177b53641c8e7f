"""Listener for the progress of a deployment, and the report of a step. Knows no terminal and no file."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_k2.deployment.plan import StagePlan
from mlx_k2.protocol.messages import FromStage, StepDone
from mlx_k2.scheduling.microbatch import Microbatch
from mlx_k2.weights.checkpoint import ModelDescription


@dataclass(frozen=True)
class StageReport:
    """A step that stage ``rank`` has finished: its StepDone, and the time of arrival (time.monotonic)."""

    rank: int
    microbatch: Microbatch
    done: StepDone
    received_at: float


class DeploymentListener:
    """Callbacks for the progress of a deployment. In this base class they do nothing."""

    def log(self, line: str) -> None:
        """Receive a line "[stage 0 host] text", from a stage's stderr or about the stage, or "[coordinator] text".

        It may be called on any thread.
        """

    def notify(self, line: str) -> None:
        """Receive a message for the user, for instance about what is slow or may change the answer."""

    def phase(self, what: str) -> None:
        """Receive the description of the next phase of all stages."""

    def planned(self, model: ModelDescription, plans: Sequence[StagePlan]) -> None:
        """Receive the plan: each stage and its layers."""

    def progress(self, rank: int, message: FromStage) -> None:
        """Receive a stage's LayerLoaded, or its DownloadProgress."""
