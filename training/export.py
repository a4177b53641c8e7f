"""The export of a trained model in Kimi K2's format: names, dtypes, packed INT4, index, tokenizer. Knows no training.

python -m training.export --run DIR --out DIR
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.blocks import FeedForward
from training.checkpoint import load
from training.conversation import Json
from training.experts import Experts
from training.model import Layer, Model
from training.quantize import GROUP, pack, quantize
from training.shape import Shape
from training.vocabulary import NUM_RESERVED, SPECIAL_OFFSETS, write_tokenizer_config

_TEMPLATE = Path("mlx_k2/builtin/kimi-k2-tiny/chat_template.jinja")

Tensors = dict[str, Tensor]


def layer_tensors(layer: Layer, prefix: str) -> Tensors:
    """Return one layer's tensors by their exported names."""
    outside = {name: weight for name, weight in layer.state_dict().items() if not name.startswith("mlp.")}
    tensors = {f"{prefix}.{name}": weight.bfloat16() for name, weight in outside.items()}
    if isinstance(layer.mlp, Experts):
        return tensors | _experts_tensors(layer.mlp, f"{prefix}.mlp")
    return tensors | _feed_forward_tensors(layer.mlp, f"{prefix}.mlp")


def outer_tensors(model: Model) -> Tensors:
    """Return the tensors outside the layers: embedding, last norm, head."""
    return {
        "model.embed_tokens.weight": model.embed_tokens.detach().bfloat16(),
        "model.norm.weight": model.norm.weight.detach().bfloat16(),
        "lm_head.weight": model.lm_head.weight.detach().bfloat16(),
    }


def config(shape: Shape, num_ranks: int) -> dict[str, Json]:
    """Return the contents of config.json, with K2's fields.

    ``num_ranks`` is the number of ordinary tokens (merge ranks of the BPE); the special tokens have the ids after it.
    """
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "kimi_k2",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_attention_heads,
        "q_lora_rank": shape.q_lora_rank,
        "kv_lora_rank": shape.kv_lora_rank,
        "qk_nope_head_dim": shape.qk_nope_head_dim,
        "qk_rope_head_dim": shape.qk_rope_head_dim,
        "v_head_dim": shape.v_head_dim,
        "intermediate_size": shape.intermediate_size,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "n_routed_experts": shape.n_routed_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": shape.routed_scaling_factor,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": {
            "type": "yarn",
            "factor": shape.rope_factor,
            "original_max_position_embeddings": shape.rope_original_positions,
            "beta_fast": shape.rope_beta_fast,
            "beta_slow": shape.rope_beta_slow,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "max_position_embeddings": max_positions(shape),
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "num_nextn_predict_layers": 0,
        "bos_token_id": num_ranks + SPECIAL_OFFSETS["[BOS]"],
        "eos_token_id": num_ranks + SPECIAL_OFFSETS["<|im_end|>"],
        "pad_token_id": num_ranks + SPECIAL_OFFSETS["[PAD]"],
        "dtype": "bfloat16",
        "use_cache": True,
        "quantization_config": _quantization_config(),
    }


def generation_config(shape: Shape, num_ranks: int) -> dict[str, Json]:
    """Return the contents of generation_config.json. It is greedy, unlike K2's: so small a model errs when sampled."""
    eos = num_ranks + SPECIAL_OFFSETS["<|im_end|>"]
    return {"eos_token_id": eos, "max_length": max_positions(shape), "temperature": 0.0}


def max_positions(shape: Shape) -> int:
    """Return the number of positions that YaRN extends the model to."""
    return int(shape.rope_factor * shape.rope_original_positions)


def export(run: Path, out: Path) -> None:
    """Write every file of the checkpoint into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    model = load(run)
    files = [layer_tensors(layer, f"model.layers.{index}") for index, layer in enumerate(model.decoder_layers())]
    _write_weights([*files, outer_tensors(model)], out)
    num_ranks = model.shape.vocab_size - NUM_RESERVED
    _write_json(out / "config.json", config(model.shape, num_ranks))
    _write_json(out / "generation_config.json", generation_config(model.shape, num_ranks))
    write_tokenizer_config(out / "tokenizer_config.json", num_ranks, max_positions(model.shape))
    shutil.copyfile(run / "tiktoken.model", out / "tiktoken.model")
    (out / "chat_template.jinja").write_bytes(_TEMPLATE.read_bytes())  # may be the same file, so no copyfile


def _feed_forward_tensors(feed_forward: FeedForward, prefix: str) -> Tensors:
    return {f"{prefix}.{name}": weight.bfloat16() for name, weight in feed_forward.state_dict().items()}


def _experts_tensors(experts: Experts, prefix: str) -> Tensors:
    tensors = {
        f"{prefix}.gate.weight": experts.router.detach().bfloat16(),
        f"{prefix}.gate.e_score_correction_bias": experts.correction_bias,
    }
    tensors |= _feed_forward_tensors(experts.shared_experts, f"{prefix}.shared_experts")
    gate_projs, up_projs = experts.gate_up_proj.detach().chunk(2, dim=1)
    stacks = {"gate_proj": gate_projs, "up_proj": up_projs, "down_proj": experts.down_proj.detach()}
    for name, stack in stacks.items():
        for index, weight in enumerate(stack):
            tensors |= _packed_tensors(weight, f"{prefix}.experts.{index}.{name}")
    return tensors


def _packed_tensors(weight: Tensor, prefix: str) -> Tensors:
    codes, scale = quantize(weight)
    return {
        f"{prefix}.weight_packed": pack(codes),
        f"{prefix}.weight_scale": scale,
        f"{prefix}.weight_shape": torch.tensor(weight.shape, dtype=torch.int32),
    }


def _quantization_config() -> Json:
    weights: Json = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group: Json = {"targets": ["Linear"], "input_activations": None, "output_activations": None, "weights": weights}
    attention, shared, dense = r"re:.*self_attn.*", r"re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", attention, shared, dense],
    }


def _write_weights(files: list[Tensors], out: Path) -> None:
    file_by_tensor: dict[str, Json] = {}
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):06}.safetensors"  # as many digits as K2's files have
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o644)  # save_file makes it readable by its owner only
        file_by_tensor |= dict.fromkeys(tensors, name)
    total = sum(tensor.nbytes for tensors in files for tensor in tensors.values())
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": file_by_tensor})


def _write_json(path: Path, value: dict[str, Json]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    options = parser.parse_args()
    export(options.run, options.out)


if __name__ == "__main__":
    main()
