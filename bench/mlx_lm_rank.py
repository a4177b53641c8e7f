"""One rank of mlx-lm on a checkpoint: for each line on stdin a run, for each run a line of rates from rank 0.

python -m bench.mlx_lm_rank FOLDER [--own-dtype]

Alone it runs the whole model; with MLX_RANK and MLX_HOSTFILE set it runs mlx-lm's pipeline over MLX's ring. A line in
is {"prompt_tokens", "generate_tokens", "streams", "prefill_step"}; a line out is tokens per second: prefill, measured
as mlx-lm itself does, and decode, of all streams together while all of them run.
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
    """Load, say so, and run what is asked for until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--own-dtype", action="store_true", help="compute as mlx-lm would, not in float32")
    options = parser.parse_args()
    model = load(options.folder, own_dtype=options.own_dtype)
    print("{}", flush=True)
    for line in sys.stdin:
        rates = measure(model, **json.loads(line))
        if os.environ.get("MLX_RANK", "0") == "0":
            print(json.dumps(rates), flush=True)


def load(folder: Path, *, own_dtype: bool) -> Any:
    """The model, or this rank's layers of it."""
    model, _ = load_model(folder, lazy=True, strict=False)
    if "MLX_RANK" in os.environ:
        model.model.pipeline(mx.distributed.init(strict=True, backend="ring"))
    if not own_dtype:
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def measure(
    model: Any, *, prompt_tokens: int, generate_tokens: int, streams: int, prefill_step: int
) -> dict[str, float]:
    """One run, from cold caches."""
    began = time.perf_counter()
    if streams == 1:
        stream = one_stream(model, prompt_tokens, generate_tokens, prefill_step)
    else:
        stream = batch(model, prompt_tokens, generate_tokens, streams, prefill_step)
    arrivals = [(time.perf_counter(), count) for count in stream]
    if "MLX_RANK" in os.environ:
        mx.eval(mx.distributed.all_sum(mx.array(1.0)))  # both ranks are through before either begins anew
    decode_s = arrivals[-1][0] - arrivals[0][0]
    decoded = sum(count for _, count in arrivals[1:])
    return {"prefill": streams * prompt_tokens / (arrivals[0][0] - began), "decode": decoded / decode_s}


def one_stream(model: Any, prompt_tokens: int, generate_tokens: int, prefill_step: int) -> Iterator[int]:
    """1 for each token as it comes."""
    prompt = mx.array(prompt_ids(prompt_tokens))
    for _token, _logprobs in generate_step(prompt, model, max_tokens=generate_tokens, prefill_step_size=prefill_step):
        yield 1


def batch(model: Any, prompt_tokens: int, generate_tokens: int, streams: int, prefill_step: int) -> Iterator[int]:
    """What batch_generate does, step by step: how many tokens each step brought, from when all streams run."""
    generator = BatchGenerator(model, prefill_step_size=prefill_step, prefill_batch_size=streams)
    # streams that differ by one token, as those of mlx-k2's benchmark differ
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
