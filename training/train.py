"""The training of the demo model on a CPU, with checkpoints to resume from. Knows nothing of scores or exported files.

python -m training.train --run DIR --steps N --decay-steps N [--workers N]
"""

import argparse
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from training.batches import IGNORED, Batch, batches
from training.checkpoint import resume, save
from training.conversation import render
from training.data import TRAINING_SEED, conversations, held_out, mixed_conversations
from training.model import Model
from training.optimizer import Muon, optimizers
from training.shape import Shape
from training.vocabulary import NUM_RESERVED, load_encoding, train_ranks, write_tiktoken
from training.workers import Worker, work_together

NUM_RANKS = 1792
_VOCABULARY_CONVERSATIONS = 40_000
_MATRIX_LR, _OTHER_LR = 0.01, 0.008
_WARMUP_STEPS = 100
_BIAS_STEP = 0.005
_REPORT_STEPS, _SAVE_STEPS = 25, 200


@dataclass(frozen=True)
class Schedule:
    """Learning rates that rise over the first 100 steps, stay constant and fall to 0 over the last `decay_steps`."""

    steps: int
    decay_steps: int

    def factor(self, step: int) -> float:
        """Return the factor of the learning rates at this step."""
        return min(1.0, (step + 1) / _WARMUP_STEPS, (self.steps - step) / self.decay_steps)


def vocabulary(run: Path) -> tiktoken.Encoding:
    """Return the run's tokenizer. If it does not exist yet, train it on conversations in their final proportions."""
    path = run / "tiktoken.model"
    if not path.exists():
        stream = itertools.islice(mixed_conversations(TRAINING_SEED, held_out().keys), _VOCABULARY_CONVERSATIONS)
        texts = (piece.text for conversation in stream for piece in render(conversation))
        write_tiktoken(path, train_ranks(texts, NUM_RANKS))
    return load_encoding(path)


def reply_loss(model: Model, batch: Batch) -> torch.Tensor:
    """Return the mean cross entropy of the reply tokens."""
    hidden = model.hidden(batch.tokens, batch.is_real)
    logits = model.lm_head(hidden.flatten(0, 1)[batch.where])
    return F.cross_entropy(logits.float(), batch.targets, ignore_index=IGNORED)


def balance(model: Model, step_size: float) -> float:
    """Move each correction bias towards an even load (DeepSeek-V3, 2.1.2).

    Return the load of the least used expert, divided by the mean load of its layer.
    """
    least = 1.0
    for experts in model.experts():
        mean = experts.load.mean()
        least = min(least, (experts.load.min() / mean).item())
        experts.correction_bias.add_(torch.sign(mean - experts.load), alpha=step_size)
        experts.load.zero_()
    return least


def train(worker: Worker, run: Path, schedule: Schedule) -> None:
    """Train from the run's last checkpoint to the schedule's end. A step uses one batch of each worker."""
    encoding = vocabulary(run)
    torch.manual_seed(TRAINING_SEED)
    model = Model(Shape(vocab_size=NUM_RANKS + NUM_RESERVED))
    both = optimizers(model, _MATRIX_LR, _OTHER_LR)
    progress = resume(run, model, both)
    stream = worker.shard(batches(conversations(TRAINING_SEED, held_out().keys), encoding, progress.consumed))
    losses: list[float] = []
    while progress.step < schedule.steps:
        began = time.monotonic()
        batch = next(stream)
        factor = schedule.factor(progress.step)
        loss = reply_loss(model, batch)
        loss.backward()
        worker.average([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        update(model, both, factor)
        worker.average([experts.load for experts in model.experts()])
        least = balance(model, _BIAS_STEP * factor)
        losses.append(loss.item())
        progress.step += 1
        progress.consumed = batch.consumed
        progress.seconds += time.monotonic() - began
        if not worker.is_first:
            continue
        if progress.step % _REPORT_STEPS == 0:
            mean = sum(losses) / len(losses)
            print(f"step {progress.step} loss {mean:.4f} least {least:.2f} {progress.seconds:.0f} s", file=sys.stderr)
            losses.clear()
        if progress.step % _SAVE_STEPS == 0 or progress.step == schedule.steps:
            save(run, model, both, progress)


def update(model: Model, both: tuple[Muon, torch.optim.AdamW], factor: float) -> None:
    """Step both optimizers with their learning rates multiplied by `factor`. Clip gradients to a norm of 1 before."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer, rate in zip(both, (_MATRIX_LR, _OTHER_LR), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder for the vocabulary and the checkpoints")
    parser.add_argument("--steps", type=int, required=True, help="number of steps, including those already done")
    parser.add_argument("--decay-steps", type=int, required=True, help="last steps, over which learning rates fall")
    parser.add_argument("--workers", type=int, default=1, help="processes of one core each; a step is a batch of each")
    options = parser.parse_args()
    options.run.mkdir(parents=True, exist_ok=True)
    vocabulary(options.run)  # once, before the workers start
    work_together(options.workers, train, options.run, Schedule(options.steps, options.decay_steps))


if __name__ == "__main__":
    main()
