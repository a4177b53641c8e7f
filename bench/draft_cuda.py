"""Comparison of a draft head and its sampler on an NVIDIA GPU (MLX's CUDA back end) and on the CPU, in 2 minutes.

Set up as bench.cuda_run describes, then:

    build/cuda/bin/python -m bench.draft_cuda

A random head with K2's attention and a quarter of its SwiGLU block runs a text of 12 tokens on both: on the CPU in
float32, on the GPU in float32 and in bfloat16 with 8 bits per weight. The sampler uses the same random numbers on both.
The script prints the largest differences and the time of a draft. Exit code 1: a difference is too large; 2: no GPU.
"""

import statistics
import sys
import time
from collections.abc import Mapping

import mlx.core as mx
import msgspec
import numpy as np
from numpy.typing import NDArray

from mlx_k2.config import ModelConfig
from mlx_k2.model.draft_model import DraftModel, DraftWeights
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import assemble_attention, assemble_dense
from mlx_k2.model.linear import make_matrix
from mlx_k2.model.sampler import SamplingRequest, sample_draft
from mlx_k2.sampling import Sampling
from mlx_k2.weights.inventory import attention_specs, mlp_specs
from mlx_k2.weights.known_layout import thinking_config_fields

NUM_DRAFTED_IDS = 8192
INTERMEDIATE = 4608
NUM_TOKENS = 12
NUM_SAMPLES = 400
ID_STEP = 20
"""The head can draft every 20th token of K2's vocabulary."""
MAX_ERROR = {"float32": 3e-3, "bfloat16, 8 bits": 0.04}
"""Largest allowed difference, as a fraction of the largest logit. TF32 on a GPU has an error of 1e-3."""
MIN_EQUAL_FRACTION = 0.99
"""Fraction of samples that must be equal: rounding of the logits may decide between equally likely tokens."""
NUM_DRAFTS = 20
NUM_WARM_UP_DRAFTS = 3
"""The first drafts, which the median leaves out."""

CONFIG = ModelConfig.from_json(msgspec.json.encode(thinking_config_fields()), "Kimi K2")


def random_tensors() -> dict[str, NDArray[np.float32]]:
    """Return the tensors of a head by name. It has few drafted ids, so that a CPU runs it in seconds."""
    generator = np.random.default_rng(3)
    hidden = CONFIG.hidden_size
    specs = (*attention_specs(CONFIG, "self_attn", 2 * hidden), *mlp_specs("mlp", hidden, INTERMEDIATE))
    tensors: dict[str, NDArray[np.float32]] = {}
    for spec in specs:
        if len(spec.shape) == 1:  # the weight of a norm
            tensors[spec.name] = np.ones(spec.shape, np.float32)
        else:
            tensors[spec.name] = 1.2 / spec.shape[-1] ** 0.5 * generator.standard_normal(spec.shape, np.float32)
    tensors["lm_head"] = 3 * hidden**-0.5 * generator.standard_normal((NUM_DRAFTED_IDS, hidden), np.float32)
    # no more rows than the projection, so the text has token ids below NUM_DRAFTED_IDS only
    tensors["embedding"] = generator.standard_normal((NUM_DRAFTED_IDS, hidden), np.float32)
    return tensors


def make_model(tensors: Mapping[str, NDArray[np.float32]], dtype: mx.Dtype, bits: int | None) -> DraftModel:
    """Return the head on the default device. ``bits`` quantizes its matrices; None leaves them in ``dtype``."""
    arrays = {name: mx.array(values).astype(dtype) for name, values in tensors.items()}
    ones = mx.ones(CONFIG.hidden_size, dtype)
    weights = DraftWeights(
        embedding=arrays["embedding"],
        input_norm=ones,
        hidden_norm=ones,
        attention=assemble_attention(CONFIG, arrays, bits),
        post_attention_norm=ones,
        feed_forward=assemble_dense(arrays, "mlp", bits),
        norm=ones,
        projection=make_matrix(arrays["lm_head"], bits),
        target_ids=mx.arange(NUM_DRAFTED_IDS) * ID_STEP,
    )
    mx.eval(weights)
    cache = LatentCache(num_layers=1, num_slots=1, context_tokens=256, row_dim=CONFIG.cache_row_dim, dtype=dtype)
    return DraftModel(CONFIG, weights, cache, norms_output=False)


def run_text(model: DraftModel) -> NDArray[np.float32]:
    """Return the logits of the drafted ids after each token of a fixed text, shape (NUM_TOKENS, NUM_DRAFTED_IDS)."""
    hidden_states = np.random.default_rng(4).standard_normal((NUM_TOKENS, CONFIG.hidden_size), np.float32)
    features = mx.array(hidden_states).astype(model.cache.dtype)
    rows = []
    for index in range(NUM_TOKENS):
        token_id = 97 * index % NUM_DRAFTED_IDS
        output = model.run(token_id, features[index : index + 1], slot=0, position=index + 1)
        rows.append(np.array(model.logits(output))[0, : ID_STEP * NUM_DRAFTED_IDS : ID_STEP])
    return np.stack(rows)


def median_draft_s(model: DraftModel) -> float:
    """Return the median seconds of a draft: run the head, compute its logits, sample a token."""
    features = mx.zeros((1, CONFIG.hidden_size), model.cache.dtype)
    seconds = []
    for position in range(1, NUM_DRAFTS + 1):
        started_at = time.perf_counter()
        logits = model.logits(model.run(5, features, 0, position))
        sample_draft(logits, SamplingRequest(Sampling(seed=1), position, ()))
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds[NUM_WARM_UP_DRAFTS:])


def sample_all() -> list[int]:
    """Return tokens sampled from fixed logits over K2's vocabulary, with three settings of the filters in turn."""
    values = np.random.default_rng(5).normal(0, 3, (8, CONFIG.vocab_size)).astype(np.float32)
    filters = (Sampling(seed=1), Sampling(seed=2, top_p=0.9), Sampling(seed=3, top_k=40, min_p=0.01))
    return [
        sample_draft(mx.array(values[index % 8][None]), SamplingRequest(filters[index % 3], index, (1, 2)))
        for index in range(NUM_SAMPLES)
    ]


def main() -> int:
    """Compare the head and the sampler; return the exit code."""
    if not mx.is_available(mx.gpu):
        print("MLX has no GPU on this machine: bench/cuda_run.py has the commands that install it", file=sys.stderr)
        return 2
    tensors = random_tensors()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()  # on a CPU it runs a C++ compiler, which may be missing
    cpu_logits, cpu_samples = run_text(make_model(tensors, mx.float32, None)), np.array(sample_all())
    mx.set_default_device(mx.gpu)
    mx.enable_compile()
    passed = True
    for name, dtype, bits in (("float32", mx.float32, None), ("bfloat16, 8 bits", mx.bfloat16, 8)):
        model = make_model(tensors, dtype, bits)
        error = float(np.abs(run_text(model) - cpu_logits).max() / np.abs(cpu_logits).max())
        milliseconds = 1e3 * median_draft_s(model)
        passed = passed and error <= MAX_ERROR[name]
        print(f"{name}: largest difference {error:.2e} of the largest logit, {milliseconds:.2f} ms for a draft")
    equal_fraction = float(np.mean(np.array(sample_all()) == cpu_samples))
    print(f"sampler: {equal_fraction:.1%} of {NUM_SAMPLES} tokens equal")
    return 0 if passed and equal_fraction >= MIN_EQUAL_FRACTION else 1


if __name__ == "__main__":
    sys.exit(main())
