"""Oracle of a draft head (EAGLE-3) in PyTorch and float32, written from the published description alone.

    python tests/oracles/eagle3.py FOLDER OUT

For each head in FOLDER, which tests/oracles/draft_heads.py writes, the script saves OUT/NAME.npz: random tokens, random
hidden states of the target, the head's results for them, and the digest of the head's weights. It imports nothing of
mlx_k2.

At position t the head gets the target's hidden states at t and token t + 1, and predicts token t + 2. Further drafts
come from NUM_FURTHER_RUNS, each with the output of the run before it in place of the states, and the drafted token.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

NUM_POSITIONS, NUM_FURTHER_RUNS = 9, 2


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalize the last axis by its root mean square, and scale it."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def yarn_frequencies(dim: int, base: float, scaling: dict[str, float]) -> torch.Tensor:
    """Return YaRN's frequency of each pair of dimensions."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    plain = base**-exponents

    def dimension_of(rotations: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension_of(scaling["beta_fast"])), 0)
    high = min(math.ceil(dimension_of(scaling["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / scaling["factor"] * ramp + plain * (1 - ramp)


def mscale(factor: float, value: float) -> float:
    """Return YaRN's scale of the attention for a scaling factor. ``value`` is the config's mscale or mscale_all_dim."""
    return 0.1 * value * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: torch.Tensor, positions: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Rotate consecutive pairs of the last axis of x (tokens, heads, dim)."""
    scaling = config["rope_scaling"]
    angles = positions[:, None].double() * yarn_frequencies(x.shape[-1], config["rope_theta"], scaling)
    scale = mscale(scaling["factor"], scaling["mscale"]) / mscale(scaling["factor"], scaling["mscale_all_dim"])
    cos, sin = (scale * angles.cos()).float()[:, None], (scale * angles.sin()).float()[:, None]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Head:
    """A draft head with the keys and values of the tokens so far."""

    def __init__(self, folder: Path, target: dict[str, torch.Tensor]) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.config = config
        eagle = config["eagle_config"]
        self.aux_layers = eagle["eagle_aux_hidden_state_layer_ids"]
        self.norm_output = eagle.get("norm_output", False)
        self.weights = {
            name.replace("midlayer.", "layers.0."): tensor.float() if tensor.dtype == torch.bfloat16 else tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        self.embedding = self.weights.get("embed_tokens.weight", target["embedding"])
        self.lm_head = self.weights.get("lm_head.weight", target["lm_head"])
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[f"layers.0.{name}.weight"].T

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """Return the features (tokens, hidden) of hidden states (layers, tokens, hidden)."""
        if "fc_norm.0.weight" in self.weights:
            states = torch.stack([self.norm(layer, f"fc_norm.{index}") for index, layer in enumerate(states)])
        return torch.cat(list(states), -1) @ self.weights["fc.weight"].T

    def attention(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """Return the attention of one token, x (1, 2 hidden), to itself and the tokens so far: (1, hidden)."""
        config = self.config
        heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
        nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
        positions = torch.tensor([position])
        if config["q_lora_rank"] is None:
            query = self.linear(x, "self_attn.q_proj")
        else:
            bottleneck = self.norm(self.linear(x, "self_attn.q_a_proj"), "layers.0.self_attn.q_a_layernorm")
            query = self.linear(bottleneck, "self_attn.q_b_proj")
        query = query.view(1, heads, nope + rope)
        query = torch.cat([query[..., :nope], rotate(query[..., nope:], positions, config)], -1)
        compressed = self.linear(x, "self_attn.kv_a_proj_with_mqa")
        latent = self.norm(compressed[:, :rank], "layers.0.self_attn.kv_a_layernorm")
        rotated_key = rotate(compressed[:, None, rank:], positions, config).expand(1, heads, rope)
        keys_and_values = self.linear(latent, "self_attn.kv_b_proj").view(1, heads, nope + value)
        self.keys.append(torch.cat([keys_and_values[..., :nope], rotated_key], -1))
        self.values.append(keys_and_values[..., nope:])
        temperature = mscale(config["rope_scaling"]["factor"], config["rope_scaling"]["mscale_all_dim"])
        scale = (nope + rope) ** -0.5 * temperature**2
        scores = torch.einsum("qhd,khd->hqk", query, torch.cat(self.keys)) * scale
        output = torch.einsum("hqk,khd->qhd", scores.softmax(-1), torch.cat(self.values))
        return self.linear(output.reshape(1, heads * value), "self_attn.o_proj")

    def run(self, token: int, features: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (1, vocabulary) after a token, and the features of the next run (1, hidden)."""
        embedded = self.norm(self.embedding[token][None], "layers.0.input_layernorm")
        x = torch.cat([embedded, self.norm(features, "layers.0.hidden_norm")], -1)
        hidden = features + self.attention(x, position)
        normed = self.norm(hidden, "layers.0.post_attention_layernorm")
        gate = torch.nn.functional.silu(self.linear(normed, "mlp.gate_proj"))
        hidden = hidden + self.linear(gate * self.linear(normed, "mlp.up_proj"), "mlp.down_proj")
        normed = self.norm(hidden, "norm")
        output = normed if self.norm_output else hidden
        drafted_logits = normed @ self.lm_head.T
        if "d2t" not in self.weights:
            return drafted_logits, output
        # The head drafts some tokens only: d2t has each one's id minus its number in the head.
        logits = torch.full((1, self.embedding.shape[0]), -torch.inf)
        logits[:, torch.arange(drafted_logits.shape[-1]) + self.weights["d2t"]] = drafted_logits
        return logits, output


def read_target(folder: Path) -> dict[str, torch.Tensor]:
    """Return the embedding and the output projection of the target model, which a head may use."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {"embedding": tensors["model.embed_tokens.weight"].float(), "lm_head": tensors["lm_head.weight"].float()}


def compute(folder: Path, target: dict[str, torch.Tensor], seed: int) -> dict[str, NDArray[Any]]:
    """Run the head in ``folder`` on random states and tokens; return the arrays of its .npz file."""
    head = Head(folder, target)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(head.aux_layers), NUM_POSITIONS, head.config["hidden_size"], generator=generator)
    tokens = torch.randint(head.config["vocab_size"], (NUM_POSITIONS + 1,), generator=generator)
    features = head.fuse(states)
    results = [
        head.run(int(tokens[position + 1]), features[position : position + 1], position)
        for position in range(NUM_POSITIONS)
    ]
    for number in range(NUM_FURTHER_RUNS):
        last_logits, last_output = results[-1]
        results.append(head.run(int(last_logits.argmax()), last_output, NUM_POSITIONS + number))
    logits, outputs = zip(*results, strict=True)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()
    return {
        "digest": np.frombuffer(digest, np.uint8),
        "states": states.numpy(),
        "tokens": tokens.numpy(),
        "features": features.numpy(),
        "logits": torch.cat(logits).numpy(),
        "outputs": torch.cat(outputs).numpy(),
    }


def main() -> None:
    """Compute each head in FOLDER and save its arrays in OUT."""
    heads_folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(exist_ok=True)
    target = read_target(heads_folder / "target")
    for seed, folder in enumerate(sorted(heads_folder.iterdir())):
        if folder.name != "target":
            arrays = compute(folder, target, seed)
            np.savez_compressed(out / f"{folder.name}.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
