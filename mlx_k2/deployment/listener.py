"""Who is told how a deployment comes along."""

from collections.abc import Sequence

from mlx_k2.deployment.plan import StagePlan
from mlx_k2.protocol.messages import FromStage
from mlx_k2.weights.checkpoint import ModelDescription


class DeploymentListener:
    """Is told how a deployment comes along; this one says nothing."""

    def log(self, line: str) -> None:
        """A line of a stage's stderr, on the stage's own thread."""

    def notify(self, line: str) -> None:
        """What the user should know: what may show in the answer, what is slow, what goes wrong at the end."""

    def phase(self, what: str) -> None:
        """The next thing that all stages do."""

    def planned(self, model: ModelDescription, plans: Sequence[StagePlan]) -> None:
        """Which stage gets which layers."""

    def progress(self, rank: int, message: FromStage) -> None:
        """A stage's LayerLoaded."""
