"""The training of the built-in model's draft head. It saves its state when it ends, and a later run resumes from it.

python -m training.draft.train --data DIR --run DIR --steps N [--seconds N]

The loss (--loss) is the cross-entropy of the head's and the model's distributions (kl: its gradient is that of the
divergence), or the negative logarithm of the share on which both agree (lk, arXiv 2602.23881). It is computed over the
head's first prediction, and in every third batch over three unrolled ones, each from the output of the one before.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import optimizers
from mlx.utils import tree_flatten, tree_unflatten

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.config import ModelConfig
from training.draft.data import Row, endless_batches, read_rows
from training.draft.head import Batch, HeadForward, Weights, initial_weights

INTERMEDIATE = 768
NUM_UNROLLED = 3
_UNROLL_EVERY = 3
"""Every third batch is computed with three unrolled predictions, the others with one, a third of the work."""
_DEPTH_WEIGHTS = (1.0, 0.8, 0.64)
"""Weights of the unrolled predictions' losses."""
_BATCH_TOKENS = 4096
_MATRIX_LR, _OTHER_LR = 0.025, 0.004
_WARMUP_STEPS = 20
_REPORT_STEPS = 10


def outer_weights() -> tuple[ModelConfig, mx.array, mx.array, mx.array]:
    """Return the built-in model's config, embedding, last norm and output projection, in float32."""
    config = ModelConfig.from_json((BUILTIN_FOLDER / "config.json").read_bytes(), "the built-in model")
    last_shard = mx.load(str(BUILTIN_FOLDER / "model-00008-of-000008.safetensors"))
    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    embedding, norm, projection = (last_shard[name].astype(mx.float32) for name in names)
    return config, embedding, norm, projection


def cross_entropy(logits: mx.array, target: mx.array) -> mx.array:
    """Return the cross-entropy of each prediction: KL(target || head) plus the target's entropy, a constant."""
    chances = mx.softmax(target, axis=-1)
    return mx.logsumexp(logits, axis=-1) - mx.sum(chances * logits, axis=-1)


def disagreement(logits: mx.array, target: mx.array) -> mx.array:
    """Return -log of the probability mass on which head and target agree (LK loss)."""
    both = mx.minimum(mx.softmax(logits, axis=-1), mx.softmax(target, axis=-1))
    return -mx.log(mx.sum(both, axis=-1) + 1e-6)


LOSSES: dict[str, Callable[[mx.array, mx.array], mx.array]] = {"kl": cross_entropy, "lk": disagreement}


def make_loss(
    forward: HeadForward, loss: Callable[[mx.array, mx.array], mx.array], num_unrolled: int
) -> Callable[..., mx.array]:
    """Return the function (tree of weights, batch) -> weighted sum of the losses of ``num_unrolled`` predictions."""

    def total(tree: Any, batch: Batch) -> mx.array:
        weights = dict(tree_flatten(tree))
        target = mx.stop_gradient(forward.target_logits(batch.target))
        result = mx.array(0.0)
        for depth, logits in enumerate(forward.logits(weights, batch, num_unrolled)):
            is_real = batch.is_real[:, depth:]
            each = loss(logits[:, depth:], target[:, depth:])
            result = result + _DEPTH_WEIGHTS[depth] * mx.sum(each * is_real) / mx.maximum(mx.sum(is_real), 1)
        return result

    return total


def make_optimizer() -> optimizers.MultiOptimizer:
    """Return Muon for the matrices and Adam for the norms."""
    matrices = optimizers.Muon(learning_rate=_MATRIX_LR, momentum=0.95, weight_decay=0.0)
    others = optimizers.Adam(learning_rate=_OTHER_LR, betas=[0.9, 0.95], bias_correction=True)
    return optimizers.MultiOptimizer([matrices, others], [lambda _, weight: weight.ndim == 2])


def rate_factor(step: int, num_steps: int, decay_steps: int) -> float:
    """Return the factor of the learning rates: it rises, stays at 1, and falls to 0 over the last ``decay_steps``."""
    return min(1.0, (step + 1) / _WARMUP_STEPS, (num_steps - step) / decay_steps)


def train(rows: list[Row], run: Path, options: argparse.Namespace) -> None:
    """Train from the run's saved state to step ``options.steps``, or for ``options.seconds``."""
    config, embedding, norm, projection = outer_weights()
    used_ids = mx.array(np.unique(np.concatenate([row.tokens[row.num_prompt :] for row in rows])))
    forward = HeadForward(config, embedding, projection[used_ids])  # logits of tokens that no answer has are left out
    optimizer = make_optimizer()
    scale = float(mx.std(mx.array(rows[0].aux).astype(mx.float32)).item())
    num_aux = rows[0].aux.shape[-1] // config.hidden_size
    weights = initial_weights(config, num_aux, INTERMEDIATE, scale, mx.random.key(0))
    tree = tree_unflatten(list(weights.items()))
    optimizer.init(tree)
    first_step, tree = resume(run, tree, optimizer)
    loss = LOSSES[options.loss]
    once, unrolled = (mx.value_and_grad(make_loss(forward, loss, depth)) for depth in (1, NUM_UNROLLED))
    stream = endless_batches(rows, norm, config.rms_norm_eps, _BATCH_TOKENS, seed=first_step)
    began = time.monotonic()
    losses: list[float] = []
    for step in range(first_step, options.steps):
        is_unrolled = step % _UNROLL_EVERY == 0
        factor = rate_factor(step, options.steps, options.decay_steps)
        for part, rate in zip(optimizer.optimizers, (_MATRIX_LR, _OTHER_LR), strict=True):
            part.learning_rate = rate * factor
        value, gradients = (unrolled if is_unrolled else once)(tree, next(stream))
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        tree = optimizer.apply_gradients(gradients, tree)
        mx.eval(tree, optimizer.state, value)
        if not is_unrolled:  # a sum of several losses is not comparable
            losses.append(value.item())
        elapsed_s = time.monotonic() - began
        if (step + 1) % _REPORT_STEPS == 0 and losses:  # no losses after a start at an unrolled step
            print(f"step {step + 1} loss {sum(losses) / len(losses):.4f} {elapsed_s:.0f} s", file=sys.stderr)
            losses.clear()
        if elapsed_s > options.seconds or step + 1 == options.steps:
            save(run, tree, optimizer, step + 1)
            return


def save(run: Path, tree: Any, optimizer: optimizers.Optimizer, step: int) -> None:
    """Write the run's state. A crash during the write leaves the previous state."""
    run.mkdir(parents=True, exist_ok=True)
    state = {f"weights/{name}": weight for name, weight in tree_flatten(tree)}
    state |= {f"optimizer/{name}": value for name, value in tree_flatten(optimizer.state)}
    mx.save_safetensors(str(run / "next.safetensors"), state | {"step": mx.array(step)})
    (run / "next.safetensors").replace(run / "last.safetensors")


def resume(run: Path, tree: Any, optimizer: optimizers.Optimizer) -> tuple[int, Any]:
    """Return the run's next step and weights, and restore the optimizer; without a state, return 0 and ``tree``."""
    if not (run / "last.safetensors").exists():
        return 0, tree
    state = mx.load(str(run / "last.safetensors"))
    step = int(state.pop("step").item())
    parts: dict[str, dict[str, mx.array]] = {"weights": {}, "optimizer": {}}
    for name, value in state.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    optimizer.state = tree_unflatten(list(parts["optimizer"].items()))
    return step, tree_unflatten(list(parts["weights"].items()))


def read_weights(folder: Path) -> Weights:
    """Return the weights of a training run, or of an exported head, in float32."""
    exported = folder / "model.safetensors"
    arrays = mx.load(str(exported if exported.exists() else folder / "last.safetensors"))
    if not exported.exists():
        arrays = {name.removeprefix("weights/"): a for name, a in arrays.items() if name.startswith("weights/")}
    return {name: array.astype(mx.float32) for name, array in arrays.items()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of answers")
    parser.add_argument("--run", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, required=True, help="steps in all, those done before included")
    parser.add_argument("--decay-steps", type=int, default=200, help="last steps, over which learning rates fall")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="save and stop after this time; run the same command again to continue",
    )
    parser.add_argument("--loss", choices=tuple(LOSSES), default="kl", help="loss function  [default: kl]")
    options = parser.parse_args()
    # The pattern leaves out the file that `answers` is writing: part-NUMBER.
    train(read_rows(sorted(options.data.glob("[0-9]*.safetensors"))), options.run, options)


if __name__ == "__main__":
    main()
