"""Greedy decoding of batches of prompts with the torch model. Knows nothing of text."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from training.attention import Cache
from training.model import Model

_ROWS = 200  # prompts that are decoded together


def greedy(model: Model, prompts: Sequence[list[int]], stop: int, max_new_tokens: int) -> list[list[int]]:
    """Return the greedy continuation of each prompt, without `stop`, which ends it. Its limit is `max_new_tokens`."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    replies: dict[int, list[int]] = {}
    for start in range(0, len(order), _ROWS):
        part = order[start : start + _ROWS]
        written = _decode([prompts[index] for index in part], model, stop, max_new_tokens)
        replies |= zip(part, written, strict=True)
    return [replies[index] for index in range(len(prompts))]


@torch.no_grad()
def _decode(prompts: list[list[int]], model: Model, stop: int, max_new_tokens: int) -> Iterator[list[int]]:
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    caches = [Cache() for _ in range(model.shape.num_hidden_layers)]
    tokens = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts])
    positions = torch.arange(longest).expand_as(tokens)
    is_real = positions < lengths.unsqueeze(1)
    space = longest + max_new_tokens
    hidden = model.hidden(tokens, is_real, positions, caches, space)
    newest = _pick(model, hidden[torch.arange(len(prompts)), lengths - 1])  # (rows,)
    written = [newest]
    is_open = newest != stop
    while is_open.any() and len(written) < max_new_tokens:
        positions = (lengths + len(written) - 1).unsqueeze(1)
        # A row that has ended is computed as padding, so that it adds nothing to the experts' loads.
        hidden = model.hidden(newest.unsqueeze(1), is_open.unsqueeze(1), positions, caches, space)
        newest = _pick(model, hidden[:, 0])
        written.append(newest)
        is_open &= newest != stop
    for row in torch.stack(written, dim=1).tolist():
        yield row[: row.index(stop)] if stop in row else row


def _pick(model: Model, hidden: Tensor) -> Tensor:
    logits: Tensor = model.lm_head(hidden)
    return logits.argmax(-1)
