"""A draft head (EAGLE-3) in PyTorch, float32, written from the published description alone.

    python tests/oracles/eagle3.py FOLDER OUT

For each head in FOLDER (tests/oracles/draft_heads.py writes them) it saves OUT/NAME.npz: tokens, outputs of the
target's layers, and what the head computes of them. It imports nothing of mlx_k2.

Position t gets the target's states at t and token t + 1, and predicts token t + 2. A later hop gets the output of the
hop before in place of the states, and the drafted token.
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

POSITIONS, HOPS = 9, 2


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def yarn_frequencies(dim: int, base: float, scaling: dict[str, float]) -> torch.Tensor:
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
    return 0.1 * value * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotate(x: torch.Tensor, positions: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """x (tokens, heads, dim): consecutive pairs are rotated."""
    scaling = config["rope_scaling"]
    angles = positions[:, None].double() * yarn_frequencies(x.shape[-1], config["rope_theta"], scaling)
    size = mscale(scaling["factor"], scaling["mscale"]) / mscale(scaling["factor"], scaling["mscale_all_dim"])
    cos, sin = ((f * size).float()[:, None] for f in (angles.cos(), angles.sin()))
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


class Head:
    def __init__(self, folder: Path, target: dict[str, torch.Tensor]) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.config = config
        eagle = config["eagle_config"]
        self.aux = eagle["eagle_aux_hidden_state_layer_ids"]
        self.norm_output = eagle.get("norm_output", False)
        raw = load_file(folder / "model.safetensors")
        self.w = {
            name.replace("midlayer.", "layers.0."): x.float() if x.dtype == torch.bfloat16 else x
            for name, x in raw.items()
        }
        self.embedding = self.w.get("embed_tokens.weight", target["embedding"])
        self.lm_head = self.w.get("lm_head.weight", target["lm_head"])
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.w[f"layers.0.{name}.weight"].T

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, self.w[f"{name}.weight"], self.config["rms_norm_eps"])

    def fuse(self, states: torch.Tensor) -> torch.Tensor:
        """states (layers, tokens, hidden) -> features (tokens, hidden)."""
        if "fc_norm.0.weight" in self.w:
            states = torch.stack([self.norm(chunk, f"fc_norm.{i}") for i, chunk in enumerate(states)])
        return torch.cat(list(states), -1) @ self.w["fc.weight"].T

    def attention(self, x: torch.Tensor, position: int) -> torch.Tensor:
        """One token x (1, 2 hidden) at ``position``, after the tokens before it."""
        c = self.config
        heads, nope, rope, value = (
            c[n] for n in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        at = torch.tensor([position])
        if c["q_lora_rank"] is None:
            query = self.linear(x, "self_attn.q_proj")
        else:
            bottleneck = self.norm(self.linear(x, "self_attn.q_a_proj"), "layers.0.self_attn.q_a_layernorm")
            query = self.linear(bottleneck, "self_attn.q_b_proj")
        query = query.view(1, heads, nope + rope)
        query = torch.cat([query[..., :nope], rotate(query[..., nope:], at, c)], -1)
        compressed = self.linear(x, "self_attn.kv_a_proj_with_mqa")
        latent = self.norm(compressed[:, : c["kv_lora_rank"]], "layers.0.self_attn.kv_a_layernorm")
        shared = rotate(compressed[:, None, c["kv_lora_rank"] :], at, c).expand(1, heads, rope)
        both = self.linear(latent, "self_attn.kv_b_proj").view(1, heads, nope + value)
        self.keys.append(torch.cat([both[..., :nope], shared], -1))
        self.values.append(both[..., nope:])
        temperature = mscale(c["rope_scaling"]["factor"], c["rope_scaling"]["mscale_all_dim"])
        scale = (nope + rope) ** -0.5 * temperature**2
        scores = torch.einsum("qhd,khd->hqk", query, torch.cat(self.keys)) * scale
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), torch.cat(self.values))
        return self.linear(mixed.reshape(1, heads * value), "self_attn.o_proj")

    def run(self, token: int, features: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (1, vocabulary) and the features of the next hop (1, hidden)."""
        embedded = self.norm(self.embedding[token][None], "layers.0.input_layernorm")
        x = torch.cat([embedded, self.norm(features, "layers.0.hidden_norm")], -1)
        hidden = features + self.attention(x, position)
        normed = self.norm(hidden, "layers.0.post_attention_layernorm")
        gate = torch.nn.functional.silu(self.linear(normed, "mlp.gate_proj"))
        hidden = hidden + self.linear(gate * self.linear(normed, "mlp.up_proj"), "mlp.down_proj")
        normed = self.norm(hidden, "norm")
        own = normed @ self.lm_head.T
        if "d2t" not in self.w:
            return own, normed if self.norm_output else hidden
        logits = torch.full((1, self.embedding.shape[0]), -torch.inf)
        logits[:, torch.arange(own.shape[-1]) + self.w["d2t"]] = own
        return logits, normed if self.norm_output else hidden


def read_target(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return {"embedding": tensors["model.embed_tokens.weight"].float(), "lm_head": tensors["lm_head.weight"].float()}


def compute(folder: Path, target: dict[str, torch.Tensor], seed: int) -> dict[str, NDArray[Any]]:
    head = Head(folder, target)
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(len(head.aux), POSITIONS, head.config["hidden_size"], generator=generator)
    tokens = torch.randint(head.config["vocab_size"], (POSITIONS + 1,), generator=generator)
    features = head.fuse(states)
    logits, fed = [], []
    for position in range(POSITIONS):
        found, out = head.run(int(tokens[position + 1]), features[position : position + 1], position)
        logits.append(found)
        fed.append(out)
    for hop in range(HOPS):
        found, out = head.run(int(logits[-1].argmax()), fed[-1], POSITIONS + hop)
        logits.append(found)
        fed.append(out)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).digest()
    return {
        "digest": np.frombuffer(digest, np.uint8),
        "states": states.numpy(),
        "tokens": tokens.numpy(),
        "features": features.numpy(),
        "logits": torch.cat(logits).numpy(),
        "outputs": torch.cat(fed).numpy(),
    }


def main() -> None:
    heads, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(exist_ok=True)
    target = read_target(heads / "target")
    for seed, folder in enumerate(sorted(heads.iterdir())):
        if folder.name != "target":
            results = compute(folder, target, seed)
            np.savez_compressed(out / f"{folder.name}.npz", allow_pickle=False, **results)


if __name__ == "__main__":
    main()
