"""The checkpoints that benchmarks run on: random, seeded, written once under the system's temporary folder."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary

VOCAB_SIZE = 2048
CONTEXT_TOKENS = 8192

SHAPES: dict[str, dict[str, Any]] = {
    # An even number of layers, all with experts, so that two stages weigh the same; as many experts a token as K2 has.
    "even": {
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
    },
    # Until a prompt's last token only the cache of the last layer is needed, so the last of two stages has one layer
    # less to compute: one of twenty is little. Keys and values of earlier chunks, which each chunk makes anew from the
    # cache, are as small a part of the work as in K2 (1.6% of a layer's products for each earlier token; K2: 1.7%).
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
    # As many layers as Kimi K2, each as small as can be: what is left is the cost of running layers at all.
    "deep": {"num_hidden_layers": 61},
}


CYCLE = "cycle"
"""The shape "even" with branches that add next to nothing: a token then decides the next one, and greedy text soon goes
round in a circle."""
_BRANCH_ENDS = ("o_proj.weight", "down_proj.weight", "down_proj.weight_scale")
_LITTLE = 2.0**-8


def cycle_checkpoint() -> Path:
    """The folder of the checkpoint whose greedy text repeats itself, written now if it is not there."""
    quiet_of = bench_checkpoint("even")
    folder = quiet_of.with_name(quiet_of.name.replace("even", CYCLE))
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.copytree(quiet_of, partial, dirs_exist_ok=True)
        for file in partial.glob("*.safetensors"):
            tensors = mx.load(str(file))
            assert isinstance(tensors, dict)
            quieter = {
                name: tensor * mx.array(_LITTLE, tensor.dtype) if name.endswith(_BRANCH_ENDS) else tensor
                for name, tensor in tensors.items()
            }
            mx.eval(quieter)
            mx.save_safetensors(str(file), quieter)
        partial.rename(folder)
    return folder


def bench_checkpoint(shape: str) -> Path:
    """The folder of the checkpoint of that shape, written now if it is not there."""
    vocabulary = tiny_vocabulary(VOCAB_SIZE, CONTEXT_TOKENS)
    ids = {"bos_token_id": vocabulary.bos_token_id, "eos_token_id": vocabulary.eos_token_id}
    fields = tiny_config_fields(VOCAB_SIZE, max_position_embeddings=CONTEXT_TOKENS, **ids, **SHAPES[shape])
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=4).hexdigest()
    folder = Path(tempfile.gettempdir()) / "mlx-k2-bench" / f"{shape}-{digest}"
    if not folder.exists():
        write_random_checkpoint(folder, fields, seed=1, tokenizer_files=vocabulary.files)
    return folder
