"""The training of the built-in model's draft head, with checkpoints to resume from.

python -m training.draft.train --data DIR --run DIR --epochs N [--seconds N]

The loss is the divergence of the head's distribution from the model's (KL), or the negative logarithm of the share on
which both agree (LK, arXiv 2602.23881), over three unrolled steps.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx import optimizers
from mlx.utils import tree_flatten, tree_unflatten

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.config import ModelConfig
from training.draft.data import Row, batches, read_rows
from training.draft.head import Batch, HeadForward, Weights, initial_weights

INTERMEDIATE = 768
NUM_STEPS = 3
_UNROLL_EVERY = 3
"""Every third batch is computed in three unrolled steps, the others in one, which is a third of the work."""
_STEP_WEIGHTS = (1.0, 0.8, 0.64)
_BATCH_TOKENS = 4096
_MATRIX_LR, _OTHER_LR = 0.01, 0.003
_WARMUP_STEPS = 20
_REPORT_STEPS = 10


@dataclass
class Progress:
    """Epochs and steps that are done."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0


def outer_weights() -> tuple[ModelConfig, mx.array, mx.array, mx.array]:
    """Return the built-in model's config, embedding, last norm and output projection, in float32."""
    config = ModelConfig.from_json((BUILTIN_FOLDER / "config.json").read_bytes())
    first = mx.load(str(BUILTIN_FOLDER / "model-00008-of-000008.safetensors"))
    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    embedding, norm, head = (first[name].astype(mx.float32) for name in names)
    return config, embedding, norm, head


def divergence(logits: mx.array, target: mx.array) -> mx.array:
    """Return KL(target || head) of each prediction, up to the target's entropy."""
    chances = mx.softmax(target, axis=-1)
    return mx.logsumexp(logits, axis=-1) - mx.sum(chances * logits, axis=-1)


def disagreement(logits: mx.array, target: mx.array) -> mx.array:
    """Return -log of the probability mass on which head and target agree (LK loss)."""
    both = mx.minimum(mx.softmax(logits, axis=-1), mx.softmax(target, axis=-1))
    return -mx.log(mx.sum(both, axis=-1) + 1e-6)


LOSSES: dict[str, Callable[[mx.array, mx.array], mx.array]] = {"kl": divergence, "lk": disagreement}


def make_loss(
    forward: HeadForward, loss: Callable[[mx.array, mx.array], mx.array], num_steps: int
) -> Callable[..., mx.array]:
    """Return the function (weights, batch) -> sum of the mean losses of ``num_steps`` unrolled steps."""

    def total(weights: Weights, batch: Batch) -> mx.array:
        target = mx.stop_gradient(forward.target_logits(batch.target))
        result = mx.array(0.0)
        for step, logits in enumerate(forward.logits(weights, batch, num_steps)):
            is_real = batch.is_real[:, step:]
            each = loss(logits[:, step:], target[:, step:])
            result = result + _STEP_WEIGHTS[step] * mx.sum(each * is_real) / mx.maximum(mx.sum(is_real), 1)
        return result

    return total


def make_optimizer(total_steps: int) -> optimizers.Optimizer:
    """Return Muon for the matrices and Adam for the norms, with rates that rise, and fall to 0 at the last step."""

    def schedule(peak: float) -> Callable[[mx.array], mx.array]:
        rise = optimizers.linear_schedule(peak / _WARMUP_STEPS, peak, _WARMUP_STEPS)
        fall = optimizers.cosine_decay(peak, max(1, total_steps - _WARMUP_STEPS))
        return optimizers.join_schedules([rise, fall], [_WARMUP_STEPS])

    matrices = optimizers.Muon(learning_rate=schedule(_MATRIX_LR), momentum=0.95, weight_decay=0.0)
    others = optimizers.Adam(learning_rate=schedule(_OTHER_LR), betas=[0.9, 0.95])
    return optimizers.MultiOptimizer([matrices, others], [lambda _, weight: weight.ndim == 2])


def train(rows: list[Row], run: Path, num_epochs: int, seconds: float, loss_name: str) -> None:
    """Train from the run's last checkpoint to the end of the last epoch, or for ``seconds``."""
    config, embedding, norm, head = outer_weights()
    forward = HeadForward(config, embedding, head)
    num_batches = sum(1 for _ in batches(rows, norm, config.rms_norm_eps, _BATCH_TOKENS, seed=0))
    optimizer = make_optimizer(num_batches * num_epochs)
    scale = float(mx.std(mx.array(rows[0].aux).astype(mx.float32)).item())
    num_aux = rows[0].aux.shape[-1] // config.hidden_size
    weights = initial_weights(config, num_aux, INTERMEDIATE, scale, mx.random.key(0))
    optimizer.init(weights)
    progress, weights = resume(run, weights, optimizer)
    first, unrolled = (mx.value_and_grad(make_loss(forward, LOSSES[loss_name], steps)) for steps in (1, NUM_STEPS))
    began = time.monotonic()
    losses: list[float] = []
    for epoch in range(progress.epoch, num_epochs):
        for number, batch in enumerate(batches(rows, norm, config.rms_norm_eps, _BATCH_TOKENS, seed=epoch)):
            if number < progress.step_in_epoch:
                continue
            is_unrolled = number % _UNROLL_EVERY == 0
            loss, gradients = (unrolled if is_unrolled else first)(weights, batch)
            gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
            weights = optimizer.apply_gradients(gradients, weights)
            mx.eval(weights, optimizer.state, loss)
            if not is_unrolled:
                losses.append(loss.item())
            progress = Progress(epoch, number + 1, progress.step + 1)
            if progress.step % _REPORT_STEPS == 0:
                mean, elapsed_s = sum(losses) / len(losses), time.monotonic() - began
                print(f"epoch {epoch} step {progress.step} loss {mean:.4f} {elapsed_s:.0f} s", file=sys.stderr)
                losses.clear()
            if time.monotonic() - began > seconds:
                save(run, weights, optimizer, progress)
                return
        progress = Progress(epoch + 1, 0, progress.step)
    save(run, weights, optimizer, progress)


def save(run: Path, weights: Weights, optimizer: optimizers.Optimizer, progress: Progress) -> None:
    """Write the run's state. A crash during the write leaves the previous state."""
    run.mkdir(parents=True, exist_ok=True)
    state = {f"weights/{name}": weight for name, weight in weights.items()}
    state |= {f"optimizer/{name}": value for name, value in tree_flatten(optimizer.state)}
    state |= {f"progress/{name}": mx.array(value) for name, value in vars(progress).items()}
    mx.save_safetensors(str(run / "next.safetensors"), state)
    (run / "next.safetensors").replace(run / "last.safetensors")


def resume(run: Path, weights: Weights, optimizer: optimizers.Optimizer) -> tuple[Progress, Weights]:
    """Return the run's last progress and weights, and restore the optimizer; without a state, return ``weights``."""
    if not (run / "last.safetensors").exists():
        return Progress(), weights
    state = mx.load(str(run / "last.safetensors"))
    parts: dict[str, dict[str, mx.array]] = {"weights": {}, "optimizer": {}, "progress": {}}
    for name, value in state.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
    return Progress(**{name: int(value.item()) for name, value in parts["progress"].items()}), parts["weights"]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of answers")
    parser.add_argument("--run", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--epochs", type=int, required=True, help="epochs in all, those done before included")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long; the same command goes on")
    parser.add_argument("--loss", choices=tuple(LOSSES), default="kl")
    options = parser.parse_args()
    train(read_rows(sorted(options.data.glob("[0-9]*.safetensors"))), options.run, options.epochs, options.seconds, options.loss)


if __name__ == "__main__":
    main()
