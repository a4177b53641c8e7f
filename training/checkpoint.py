"""A training run's state on disk. Knows nothing of training or of exported files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.model import Model
from training.shape import Shape


@dataclass
class Progress:
    """Progress of a run: steps, conversations read from the stream, and seconds of training."""

    step: int = 0
    consumed: int = 0
    seconds: float = 0.0


def save(run: Path, model: Model, optimizers: tuple[torch.optim.Optimizer, ...], progress: Progress) -> None:
    """Write the run's state. A crash during the write leaves the previous state."""
    state = {
        "shape": model.shape.as_dict(),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": vars(progress),
    }
    torch.save(state, run / "next.pt")
    (run / "next.pt").replace(run / "last.pt")


def resume(run: Path, model: Model, optimizers: tuple[torch.optim.Optimizer, ...]) -> Progress:
    """Load the run's last state into the model and the optimizers. Return zero progress if the run has no state."""
    if not (run / "last.pt").exists():
        return Progress()
    state: dict[str, Any] = torch.load(run / "last.pt")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return Progress(**state["progress"])


def load(run: Path) -> Model:
    """Return the run's model with its unrounded weights."""
    state: dict[str, Any] = torch.load(run / "last.pt")
    model = Model(Shape(**state["shape"]))
    model.load_state_dict(state["model"])
    return model


def load_frozen(run: Path, is_quantized: bool) -> Model:
    """Return the run's model for inference: routed experts rounded to INT4 or bfloat16, expert loads set to zero."""
    model = load(run).eval()
    for experts in model.experts():
        experts.freeze(is_quantized)
        experts.load.zero_()
    return model
