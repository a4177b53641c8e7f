"""A new training run with the weights of an exported checkpoint, to train it further. Knows no training.

python -m training.restore --model DIR --run DIR [--consumed N]
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, cat, stack

from training.checkpoint import Progress, save
from training.experts import Experts
from training.model import Layer, Model
from training.optimizer import optimizers
from training.quantize import dequantize, unpack
from training.shape import Shape

Tensors = dict[str, Tensor]


def read(folder: Path) -> Model:
    """Return the exported model. Routed experts have the dequantized values of their INT4 codes."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    model = Model(_shape(json.loads((folder / "config.json").read_text())))
    state = {
        "embed_tokens": tensors["model.embed_tokens.weight"],
        "norm.weight": tensors["model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for index, layer in enumerate(model.decoder_layers()):
        state |= _layer_state(layer, f"layers.{index}", tensors)
    model.load_state_dict(state, strict=True)
    return model


def _shape(config: dict[str, object]) -> Shape:
    yarn = config["rope_scaling"]
    assert isinstance(yarn, dict)
    rope = {
        "rope_factor": yarn["factor"],
        "rope_original_positions": yarn["original_max_position_embeddings"],
        "rope_beta_fast": yarn["beta_fast"],
        "rope_beta_slow": yarn["beta_slow"],
    }
    fields = Shape.__dataclass_fields__
    return Shape(**{name: config[name] for name in fields if name in config} | rope)  # type: ignore[arg-type]


def _layer_state(layer: Layer, prefix: str, tensors: Tensors) -> Tensors:
    """Return one layer's state. The names of experts and router differ from the checkpoint's, all others are equal."""
    shipped = {name: tensors.get(f"model.{prefix}.{name}") for name in layer.state_dict()}
    state = {f"{prefix}.{name}": tensor for name, tensor in shipped.items() if tensor is not None}
    return state | _experts_state(layer.mlp, f"{prefix}.mlp", tensors) if isinstance(layer.mlp, Experts) else state


def _experts_state(experts: Experts, prefix: str, tensors: Tensors) -> Tensors:
    def stacked(name: str) -> Tensor:
        parts = (f"model.{prefix}.experts.{index}.{name}" for index in range(experts.shape.n_routed_experts))
        return stack([_weight(part, tensors) for part in parts])

    return {
        f"{prefix}.router": tensors[f"model.{prefix}.gate.weight"],
        f"{prefix}.correction_bias": tensors[f"model.{prefix}.gate.e_score_correction_bias"],
        f"{prefix}.load": experts.load,
        f"{prefix}.gate_up_proj": cat([stacked("gate_proj"), stacked("up_proj")], dim=1),
        f"{prefix}.down_proj": stacked("down_proj"),
    }


def _weight(prefix: str, tensors: Tensors) -> Tensor:
    return dequantize(unpack(tensors[f"{prefix}.weight_packed"]), tensors[f"{prefix}.weight_scale"])


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder of the exported checkpoint")
    parser.add_argument("--run", type=Path, required=True, help="folder of the new run")
    parser.add_argument("--consumed", type=int, default=0, help="number of conversations that the model was trained on")
    options = parser.parse_args()
    options.run.mkdir(parents=True)
    shutil.copyfile(options.model / "tiktoken.model", options.run / "tiktoken.model")
    model = read(options.model)
    fresh = optimizers(model, matrix_lr=0.0, other_lr=0.0)  # training sets the rates of each step
    save(options.run, model, fresh, Progress(consumed=options.consumed))


if __name__ == "__main__":
    main()
