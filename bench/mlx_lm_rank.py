"""One rank of mlx-lm on a checkpoint, in float32.

python -m bench.mlx_lm_rank FOLDER PROMPT_TOKENS TOKENS PREFILL_STEP

Alone it runs the whole model; with MLX_RANK and MLX_HOSTFILE set it runs mlx-lm's pipeline over MLX's ring. Rank 0
prints one JSON line: prefill and decode tokens per second, the first measured as mlx-lm itself does.
"""

import json
import os
import sys
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from bench.measure import prompt_ids


def main() -> None:
    """Load, generate once to warm up and once to measure."""
    folder, num_prompt, num_tokens, step = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    model, _ = load_model(folder, lazy=True, strict=False)
    if "MLX_RANK" in os.environ:
        group = mx.distributed.init(strict=True, backend="ring")
        model.model.pipeline(group)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    for _ in range(2):
        prompt = mx.array(prompt_ids(num_prompt))
        arrivals = []
        began = time.perf_counter()
        for _token, _logprobs in generate_step(prompt, model, max_tokens=num_tokens, prefill_step_size=step):
            arrivals.append(time.perf_counter())
    if "MLX_RANK" in os.environ:
        mx.eval(mx.distributed.all_sum(mx.array(1.0)))  # a rank that left now would break the other's last step
    if os.environ.get("MLX_RANK", "0") == "0":
        decode_s = arrivals[-1] - arrivals[0]
        rates = {"prefill": num_prompt / (arrivals[0] - began), "decode": (num_tokens - 1) / decode_s}
        print(json.dumps(rates), flush=True)


if __name__ == "__main__":
    main()
