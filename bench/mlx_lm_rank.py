"""Rank of mlx-lm on a checkpoint. Each line on stdin starts a run; rank 0 prints a line of rates for each run.

python -m bench.mlx_lm_rank FOLDER

A single rank runs the whole model. With MLX_RANK and MLX_HOSTFILE set, the rank is part of mlx-lm's pipeline over MLX's
ring. Each rank first prints {}, when its model is loaded. An input line is a JSON object with "prompt_tokens",
"generate_tokens", "streams" and "prefill_step". A line of rates is a JSON object of tokens per second: "prefill", up to
the first token, as mlx-lm itself measures it, and "decode", the total of all streams while all of them run.
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
    """Load the model, and run the lines of stdin until it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the checkpoint")
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
    """Run the streams once with empty caches; return the rates "prefill" and "decode" in tokens per second."""
    started_at = time.perf_counter()
    if streams == 1:
        steps = run_one_stream(model, prompt_tokens, generate_tokens, prefill_step)
    else:
        steps = run_batch(model, prompt_tokens, generate_tokens, streams, prefill_step)
    arrivals = [(time.perf_counter(), num_tokens) for num_tokens in steps]
    if "MLX_RANK" in os.environ:
        mx.eval(mx.distributed.all_sum(mx.array(1.0)))  # no rank starts the next run before all have finished this one
    first_at, last_at = arrivals[0][0], arrivals[-1][0]
    num_decoded = sum(num_tokens for _, num_tokens in arrivals[1:])
    prefill_rate = streams * prompt_tokens / (first_at - started_at)
    return {"prefill": prefill_rate, "decode": num_decoded / (last_at - first_at)}


def run_one_stream(model: Any, prompt_tokens: int, generate_tokens: int, prefill_step: int) -> Iterator[int]:
    """Yield 1 when a token is generated."""
    prompt = mx.array(prompt_ids(prompt_tokens))
    for _token, _logprobs in generate_step(prompt, model, max_tokens=generate_tokens, prefill_step_size=prefill_step):
        yield 1


def run_batch(model: Any, prompt_tokens: int, generate_tokens: int, streams: int, prefill_step: int) -> Iterator[int]:
    """Run mlx-lm's batch generation; yield the tokens per step, from the first step in which all streams run."""
    generator = BatchGenerator(model, prefill_step_size=prefill_step, prefill_batch_size=streams)
    # As in mlx-k2's benchmark, the prompts have no common prefix.
    prompts = [[stream, *prompt_ids(prompt_tokens - 1)] for stream in range(streams)]
    generator.insert(prompts, [generate_tokens] * streams)
    all_streams_run = False
    while responses := generator.next_generated():
        all_streams_run = all_streams_run or len(responses) == streams
        if all_streams_run:
            yield len(responses)
    generator.close()


if __name__ == "__main__":
    main()
