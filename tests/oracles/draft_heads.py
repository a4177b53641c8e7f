"""Writer of the random draft heads that tests/oracles/eagle3.py runs. Tests write them again, to compare the results.

python -m tests.oracles.draft_heads FOLDER
python tests/oracles/eagle3.py FOLDER tests/oracles/eagle3     # with tests/oracles/requirements.txt installed
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_k2.config import ModelConfig
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.random_draft_head import draft_config_fields, write_random_draft_head
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.weights.draft_head import EMBEDDING, LM_HEAD

TARGET: Mapping[str, Any] = tiny_config_fields(
    vocab_size=192, hidden_size=64, num_attention_heads=2, kv_lora_rank=32, q_lora_rank=32, intermediate_size=96
)
_WIDE = {"num_attention_heads": 4, "kv_lora_rank": 48, "v_head_dim": 16, "qk_nope_head_dim": 24}
_NORM_OUTPUT = {"eagle_aux_hidden_state_layer_ids": [0, 2, 6], "norm_output": True}

HEADS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "own": ({}, {}),
    "shared": ({}, {"own_tensors": ()}),
    "midlayer-32k": ({"draft_vocab_size": 80}, {"layer_prefix": "midlayer", "own_tensors": (LM_HEAD,)}),
    "eagle31": ({"eagle_config": _NORM_OUTPUT}, {"fc_norms": True, "own_tensors": (EMBEDDING,)}),
    "wide": ({**_WIDE, "architectures": ["Eagle3DeepseekV3ForCausalLM"]}, {}),
    "direct-query": ({"q_lora_rank": None, "rms_norm_eps": 1e-2}, {}),
}
"""Changes of the head's config.json and arguments of write_random_draft_head, by the name of the head."""


def write_heads(folder: Path) -> None:
    """Write the target model to ``folder``/target, and each head to ``folder``/NAME."""
    write_random_checkpoint(folder / "target", TARGET, seed=3, tokenizer_files={})
    target = ModelConfig.from_json((folder / "target" / "config.json").read_bytes(), "the target")
    for seed, (name, (changes, arguments)) in enumerate(HEADS.items()):
        write_random_draft_head(folder / name, draft_config_fields(TARGET, **changes), target, seed, **arguments)


if __name__ == "__main__":
    write_heads(Path(sys.argv[1]))
