"""A draft head and its sampler on an NVIDIA GPU through MLX's CUDA back end, beside the CPU: less than 2 minutes.

Set up as bench.cuda_run describes, then:

    build/cuda/bin/python -m bench.draft_cuda

A random head with K2's attention and a quarter of its SwiGLU block runs a text of 12 tokens on both, in float32 and in
bfloat16 with 8 bits per weight. The sampler draws with the same noise on both. It prints the largest differences and
the time of a draft, and ends with exit code 1 if a difference is too large, with 2 without a GPU.
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

DRAFTED_IDS = 8192
INTERMEDIATE = 4608
NUM_TOKENS = 12
NUM_SAMPLES = 400
LARGEST_ERROR = {"float32": 3e-3, "bfloat16, 8 bits": 0.04}
"""Of the largest value. A GPU may multiply float32 in TF32, with an error of 1e-3."""
FEWEST_EQUAL = 0.99
"""Share of tokens that both draw: a rounding of the logits decides between two that are equally likely."""
TIMED_DRAFTS = 20

CONFIG = ModelConfig.from_json(msgspec.json.encode(thinking_config_fields()), "Kimi K2")


def random_tensors() -> dict[str, NDArray[np.float32]]:
    """Return the tensors of a head by name, small enough for seconds on a CPU: 8192 drafted tokens."""
    generator = np.random.default_rng(3)
    hidden = CONFIG.hidden_size
    specs = (*attention_specs(CONFIG, "self_attn", 2 * hidden), *mlp_specs("mlp", hidden, INTERMEDIATE))
    tensors = {}
    for spec in specs:
        scale = 1.2 / spec.shape[-1] ** 0.5 if len(spec.shape) > 1 else 0.0
        tensors[spec.name] = scale * generator.standard_normal(spec.shape, np.float32) + (0 if scale else 1)
    tensors["lm_head"] = 3 * hidden**-0.5 * generator.standard_normal((DRAFTED_IDS, hidden), np.float32)
    tensors["embedding"] = generator.standard_normal((DRAFTED_IDS, hidden), np.float32)
    return tensors


def make_model(tensors: Mapping[str, NDArray[np.float32]], dtype: mx.Dtype, bits: int | None) -> DraftModel:
    """Return the head on the default device."""
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
        target_ids=mx.arange(DRAFTED_IDS) * 20,
    )
    mx.eval(weights)
    return DraftModel(CONFIG, weights, LatentCache(1, 1, 256, CONFIG.cache_row_dim, dtype), norms_output=False)


def run_text(model: DraftModel) -> NDArray[np.float32]:
    """Return the logits of the drafted ids after each token of a text with given features: (tokens, drafted ids)."""
    given = np.random.default_rng(4).standard_normal((NUM_TOKENS, CONFIG.hidden_size), np.float32)
    features = mx.array(given).astype(model.cache.dtype)
    found = []
    for at in range(NUM_TOKENS):
        output = model.run(97 * at % DRAFTED_IDS, features[at : at + 1], 0, at + 1)
        found.append(np.array(model.logits(output))[0, : 20 * DRAFTED_IDS : 20])
    return np.stack(found)


def time_drafts(model: DraftModel) -> float:
    """Return the median seconds of a draft: the head, its logits and the sampling of a token."""
    features = mx.zeros((1, CONFIG.hidden_size), model.cache.dtype)
    seconds = []
    for position in range(1, TIMED_DRAFTS + 1):
        began = time.perf_counter()
        logits = model.logits(model.run(5, features, 0, position))
        sample_draft(logits, SamplingRequest(Sampling(seed=1), position, ()))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[3:])


def sample_all() -> list[int]:
    """Return the tokens of fixed logits over K2's vocabulary, with all filters in turn."""
    values = np.random.default_rng(5).normal(0, 3, (8, CONFIG.vocab_size)).astype(np.float32)
    filters = (Sampling(seed=1), Sampling(seed=2, top_p=0.9), Sampling(seed=3, top_k=40, min_p=0.01))
    return [
        sample_draft(mx.array(values[at % 8][None]), SamplingRequest(filters[at % 3], at, (1, 2)))
        for at in range(NUM_SAMPLES)
    ]


def main() -> int:
    """Compare the head and the sampler; return the exit code."""
    if not mx.is_available(mx.gpu):
        print("this machine has no GPU that MLX can use", file=sys.stderr)
        return 2
    tensors = random_tensors()
    mx.set_default_device(mx.cpu)
    mx.disable_compile()
    expected, sampled = run_text(make_model(tensors, mx.float32, None)), sample_all()
    mx.set_default_device(mx.gpu)
    is_right = True
    for name, dtype, bits in (("float32", mx.float32, None), ("bfloat16, 8 bits", mx.bfloat16, 8)):
        model = make_model(tensors, dtype, bits)
        error = float(np.abs(run_text(model) - expected).max() / np.abs(expected).max())
        milliseconds = 1e3 * time_drafts(model)
        is_right &= error <= LARGEST_ERROR[name]
        print(f"{name}: largest difference {error:.2e} of the largest logit, {milliseconds:.2f} ms for a draft")
    equal = float(np.mean(np.array(sample_all()) == np.array(sampled)))
    print(f"sampler: {equal:.1%} of {NUM_SAMPLES} tokens equal")
    return 0 if is_right and equal >= FEWEST_EQUAL else 1


if __name__ == "__main__":
    sys.exit(main())
