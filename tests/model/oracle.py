"""mlx-lm's DeepseekV3 model of a checkpoint: the independent reference of the model's tests."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.models import deepseek_v3
from mlx_lm.models.mla import MultiLinear


def load_oracle(folder: Path, dense_bits: int | None = None) -> Any:
    """Return mlx-lm's model of the checkpoint in ``folder``, in float32, with experts in INT4 as shipped.

    With ``dense_bits`` MLX's own nn.quantize quantizes attention, shared experts, dense layers and the head.
    """
    config = msgspec.json.decode((folder / "config.json").read_bytes(), type=dict[str, Any])
    config = config.get("text_config", config)
    config["n_shared_experts"] = config["n_shared_experts"] or None  # mlx-lm expects None instead of 0
    model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(config))
    tensors: dict[str, mx.array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= mx.load(str(path))  # type: ignore[arg-type]  # a file of tensors is a dict
    tensors = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
    weights = model.sanitize({name: tensors[name] for name in tensors if name.startswith(("model.", "lm_head."))})
    nn.quantize(model, group_size=32, bits=4, class_predicate=lambda path, module: f"{path}.scales" in weights)
    model.load_weights([(name, _in_float32(tensor)) for name, tensor in weights.items()])
    if dense_bits is not None:
        _quantize_dense(model, dense_bits)
    model.eval()
    mx.eval(model.parameters())
    return model


def _quantize_dense(model: nn.Module, bits: int) -> None:
    def quantization(path: str, module: nn.Module) -> bool | dict[str, int]:
        if isinstance(module, nn.Embedding) or not isinstance(module, nn.Linear | MultiLinear):
            return False
        return {"group_size": 64 if module.weight.shape[-1] % 64 == 0 else 32, "bits": bits}

    nn.quantize(model, class_predicate=quantization)


def _in_float32(tensor: mx.array) -> mx.array:
    return tensor.astype(mx.float32) if tensor.dtype == mx.bfloat16 else tensor
