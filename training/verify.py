"""A comparison of an exported checkpoint's greedy replies in mlx-lm's DeepSeek-V3 with saved ones. Knows no torch.

Needs mlx-lm instead of torch: python -m training.verify --model DIR --replies FILE
FILE has one {"prompt": [ids], "reply": [ids]} per line, as training.score_run --save-replies writes it.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.deepseek_v3 import Model, ModelArgs

_GROUP, _BITS = 32, 4


def load(folder: Path) -> Model:
    """Load the checkpoint in float32, with the tensors renamed by mlx-lm itself."""
    config = json.loads((folder / "config.json").read_text())
    model = Model(ModelArgs.from_dict(config))
    weights: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= mx.load(str(path))
    weights = model.sanitize(weights)
    nn.quantize(model, _GROUP, _BITS, class_predicate=lambda path, _: f"{path}.scales" in weights)
    model.load_weights(list(weights.items()))
    model.set_dtype(mx.float32)
    model.eval()
    return model


def greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    """Return `count` greedy tokens after the prompt."""
    cache = make_prompt_cache(model)
    tokens, reply = prompt, []
    for _ in range(count):
        logits = model(mx.array([tokens]), cache=cache)
        tokens = [int(logits[0, -1].argmax().item())]
        reply += tokens
    return reply


def different(model: Model, lines: list[str]) -> Iterator[str]:
    """Yield one line about each prompt whose reply differs from the saved one."""
    for number, line in enumerate(lines):
        saved = json.loads(line)
        reply = greedy(model, saved["prompt"], len(saved["reply"]))
        if reply != saved["reply"]:
            yield f"reply {number}: {reply} is not {saved['reply']}"


def main() -> None:
    """Run the command. Exit with code 1 if a reply is different."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the exported checkpoint")
    parser.add_argument("--replies", type=Path, required=True, help="saved prompts and replies")
    options = parser.parse_args()
    lines = options.replies.read_text().splitlines()
    faults = list(different(load(options.model), lines))
    print("\n".join([*faults, f"{len(lines) - len(faults)} of {len(lines)} replies are the same"]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
