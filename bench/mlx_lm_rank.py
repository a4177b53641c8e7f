"""One rank of mlx-lm on a checkpoint. Each line on stdin starts a run; rank 0 prints a line of rates for each run.

python -m bench.mlx_lm_rank FOLDER

Alone it runs the whole model. With MLX_RANK and MLX_HOSTFILE set it runs mlx-lm's pipeline over MLX's ring. An input
line is {"prompt_tokens", "generate_tokens", "streams", "prefill_step"}. An output line holds tokens per second:
"prefill", measured as mlx-lm itself does, and "decode", the total of all streams while all of them run.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_model

from bench.measure import prompt_ids


def main() -> None:
    """Load the model, print {} when it is loaded, and run the lines of stdin until it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    model = load(options.folder)
    print("{}", flush=True)
    for line in sys.stdin:
        rates = measure(model, **json.loads(line))
        if os.environ.get("MLX_RANK", "0") == "0":
            print(json.dumps(rates), flush=True)


def load(folder: Path) -> Any:
    """Load the model, or this rank's layers of it, in float32."""
    model, _ = load_model(folder, lazy=True, strict=False)
    if "MLX_RANK" in os.environ:
        model.model.pipeline(mx.distributed.init(strict=True, backend="ring"))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def measure(
    model: Any, *, prompt_tokens: int, generate_tokens: int, streams: int, prefill_step: int
) -> dict[str, float]:
    """Run once with empty caches; return the rates in tokens per second."""
    began = time.perf_counter()
    if streams == 1:
        stream = one_stream(model, prompt_tokens, generate_tokens, prefill_step)
    else:
        stream = batch(model, prompt_tokens, generate_tokens, streams, prefill_step)
    arrivals = [(time.perf_counter(), count) for count in stream]
    if "MLX_RANK" in os.environ:
        mx.eval(mx.distributed.all_sum(mx.array(1.0)))  # no rank starts the next run before both have finished
    decode_s = arrivals[-1][0] - arrivals[0][0]
    decoded = sum(count for _, count in arrivals[1:])
    return {"prefill": streams * prompt_tokens / (arrivals[0][0] - began), "decode": decoded / decode_s}


def one_stream(model: Any, prompt_tokens: int, generate_tokens: int, prefill_step: int) -> Iterator[int]:
    """Yield 1 for each token when it is generated."""
    prompt = mx.array(prompt_ids(prompt_tokens))
    for _token, _logprobs in generate_step(prompt, model, max_tokens=generate_tokens, prefill_step_size=prefill_step):
        yield 1


def batch(model: Any, prompt_tokens: int, generate_tokens: int, streams: int, prefill_step: int) -> Iterator[int]:
    """Run batch_generate step by step; yield the number of tokens of each step, once all streams run."""
    generator = BatchGenerator(model, prefill_step_size=prefill_step, prefill_batch_size=streams)
    # the prompts differ in one token, because those of mlx-k2's benchmark differ too
    prompts = [[stream, *prompt_ids(prompt_tokens - 1)] for stream in range(streams)]
    generator.insert(prompts, [generate_tokens] * streams)
    started = False
    while responses := generator.next_generated():
        started = started or len(responses) == streams
        if started:
            yield len(responses)
    generator.close()


if __name__ == "__main__":
    main()
