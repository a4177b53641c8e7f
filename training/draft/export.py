"""The export of a trained head in the public format of EAGLE-3 heads with multi-head latent attention.

python -m training.draft.export --run DIR --out DIR
"""

import argparse
import json
from pathlib import Path

import mlx.core as mx

from mlx_k2.builtin import BUILTIN_FOLDER
from training.conversation import Json
from training.draft.answers import AUX_LAYERS
from training.draft.train import INTERMEDIATE, read_weights

_SAME = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "rms_norm_eps", "vocab_size", "rope_theta", "rope_scaling", "hidden_act",
    "attention_bias", "max_position_embeddings",
)  # fmt: skip
"""Fields of the head's config.json that are copied from the model's."""


def config() -> dict[str, Json]:
    """Return the contents of the head's config.json. The head uses the model's embedding and output projection."""
    model: dict[str, Json] = json.loads((BUILTIN_FOLDER / "config.json").read_text())
    return {
        "architectures": ["Eagle3DeepseekV2ForCausalLM"],
        "model_type": "kimi_k2",
        **{name: model[name] for name in _SAME},
        "draft_vocab_size": model["vocab_size"],
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS),
            "use_aux_hidden_state": True,
            "use_input_layernorm_in_first_layer": True,
            "use_last_layernorm": True,
            "use_mtp_layernorm": False,
        },
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the head")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.astype(mx.bfloat16) for name, weight in read_weights(options.run).items()}
    mx.save_safetensors(str(options.out / "model.safetensors"), weights, metadata={"format": "pt"})
    (options.out / "config.json").write_text(json.dumps(config(), indent=2) + "\n")


if __name__ == "__main__":
    main()
