"""Checkpoints for the benchmarks: random weights of a fixed seed, written once under the system's temporary folder."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.random_draft_head import draft_config_fields, write_random_draft_head
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from mlx_k2.weights.checkpoint import describe_model, read_small_files
from mlx_k2.weights.model_source import DraftHead, ModelSource

VOCAB_SIZE = 2048
CONTEXT_TOKENS = 8192

# An even number of layers, all with routed experts, gives two stages equal work. Each token uses 8 experts, as in K2.
_EVEN = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 256,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 0,
}

SHAPES: dict[str, dict[str, Any]] = {
    "even": _EVEN,
    # Twice the layers of "even": a step takes more than 20 ms on each of two stages.
    "slow": _EVEN | {"num_hidden_layers": 16},
    # Before a prompt's last token, only the cache of the last layer is needed, so the last of two stages computes one
    # layer less: 1 of its 20. Each chunk rebuilds the keys and values of earlier chunks from the cache. Per earlier
    # token this costs 1.6% of the multiplications of a layer for one token (in K2: 1.7%).
    "tall": {
        "hidden_size": 512,
        "num_hidden_layers": 40,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "n_routed_experts": 32,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 0,
    },
    # As many layers as Kimi K2, each as small as possible: most of the time is the fixed cost of running a layer.
    "deep": {"num_hidden_layers": 61},
}

CYCLE = "cycle"
"""The shape "even" with residual branches that add almost nothing: each token then determines the next one, and greedy
text soon repeats in a cycle."""
_BRANCH_OUTPUTS = ("o_proj.weight", "down_proj.weight", "down_proj.weight_scale")
_BRANCH_SCALE = 2.0**-8


def cycle_checkpoint() -> Path:
    """Return the folder of the checkpoint CYCLE; write it if it does not exist."""
    original = bench_checkpoint("even")
    folder = original.with_name(original.name.replace("even", CYCLE))
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.copytree(original, partial, dirs_exist_ok=True)
        for file in partial.glob("*.safetensors"):
            tensors = mx.load(str(file))
            assert isinstance(tensors, dict)
            scaled = {
                name: tensor * mx.array(_BRANCH_SCALE, tensor.dtype) if name.endswith(_BRANCH_OUTPUTS) else tensor
                for name, tensor in tensors.items()
            }
            mx.eval(scaled)  # reads the file before it is overwritten
            mx.save_safetensors(str(file), scaled)
        partial.rename(folder)
    return folder


HEAD_AUX_LAYERS = [1, 7, 12]
"""Layers of the target whose hidden states the draft head reads. The target needs more than 12 layers, as "slow"."""
HEAD_SEED = 3


def bench_head(shape: str) -> DraftHead:
    """Return a random draft head for the checkpoint of ``shape``, a key of SHAPES; write it if it does not exist.

    It uses the checkpoint's embedding and output projection.
    """
    target = bench_checkpoint(shape)
    folder = target.with_name(f"{target.name}-head")
    if not folder.exists():
        fields = draft_config_fields(json.loads((target / "config.json").read_text()))
        fields["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = HEAD_AUX_LAYERS
        config = describe_model(read_small_files(target), str(target)).config
        write_random_draft_head(folder, fields, config, HEAD_SEED, own_tensors=())
    return DraftHead(source=ModelSource(path_or_repo=str(folder)), bits=8)


def bench_checkpoint(shape: str) -> Path:
    """Return the folder of the checkpoint of ``shape``, a key of SHAPES; write it if it does not exist."""
    vocabulary = tiny_vocabulary(VOCAB_SIZE, CONTEXT_TOKENS)
    ids = {"bos_token_id": vocabulary.bos_token_id, "eos_token_id": vocabulary.eos_token_id}
    fields = tiny_config_fields(VOCAB_SIZE, max_position_embeddings=CONTEXT_TOKENS, **ids, **SHAPES[shape])
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=4).hexdigest()
    folder = Path(tempfile.gettempdir()) / "mlx-k2-bench" / f"{shape}-{digest}"
    if not folder.exists():
        write_random_checkpoint(folder, fields, seed=1, tokenizer_files=vocabulary.files)
    return folder
