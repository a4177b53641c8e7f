"""Kimi K2 over several machines, in one file: the algorithm of mlx-k2 without the parts that make it robust and fast.

A model that is too large for one machine is divided into stages. Each stage (here: a rank of MLX's distributed group)
loads consecutive layers from the original checkpoint and keeps their cache. For each token the hidden state goes from
stage to stage; the last stage computes the next token. Prompts are computed in chunks: a stage starts the next chunk
while the following stage computes the previous one.

The prompt is a list of token ids, the answer is greedy. This prompt asks the built-in model "What is mlx-k2?". With
`mlx.launch -n 2` before `python`, two ranks on this machine answer it:

    python examples/mini_pipeline.py mlx_k2/builtin/kimi-k2-tiny 1795,301,1809,569,379,509,504,50,63,1794,1796,284,1809

This file needs only mlx and numpy. It shares no code with mlx_k2, so that a test can compare the two.
"""

import argparse
import base64
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import mlx.core as mx
import numpy as np

CHUNK_TOKENS = 512
BOTTLENECK_EPS = 1e-6  # of q_a_layernorm and kv_a_layernorm; no config has it, the published code's default is used
Tensors = dict[str, mx.array]


class Checkpoint:
    """A folder in the original layout: config.json, an index, and safetensors files that are opened as needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        fields = json.loads((folder / "config.json").read_text())
        self.prefix = "language_model." if "text_config" in fields else ""  # K2.5 and later also have a vision model
        self.config = SimpleNamespace(**fields.get("text_config", fields))
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        self.file_of: dict[str, str] = index["weight_map"]
        # bfloat16 on a GPU, as shipped; a CPU is faster and more exact in float32
        self.dtype = mx.bfloat16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32

    def tensors(self, start: str) -> Tensors:
        """Return the tensors whose names begin with ``start``, by the rest of their names. Opens no other files."""
        start = self.prefix + start
        names = [name for name in self.file_of if name.startswith(start)]
        file_tensors: Tensors = {}
        for file in {self.file_of[name] for name in names}:
            file_tensors |= cast(Tensors, mx.load(str(self.folder / file)))  # a tensor is read when it is evaluated
        tensors = {name.removeprefix(start): file_tensors[name] for name in names}
        return {name: t.astype(self.dtype) if t.dtype == mx.bfloat16 else t for name, t in tensors.items()}

    def layer(self, number: int) -> Tensors:
        """Return one layer's tensors. Those of its routed experts are stacked and keep the checkpoint's 4 bits.

        The checkpoint stores a weight w in [-8, 7] as the code w + 8, eight codes in a 32-bit word, with a scale for
        each 32 columns. This is MLX's affine format, scale * code + bias, with a bias of -8 * scale.
        """
        tensors = self.tensors(f"model.layers.{number}.")
        if number < self.config.first_k_dense_replace:
            return tensors
        for name in ("gate_proj.weight_packed", "up_proj.weight_packed", "down_proj.weight_packed"):
            tensors[f"experts.{name}"] = self._stacked(tensors, name).view(mx.uint32)
        for name in ("gate_proj.weight_scale", "up_proj.weight_scale", "down_proj.weight_scale"):
            tensors[f"experts.{name}"] = self._stacked(tensors, name)
        mx.eval(tensors)  # read now, so that at most one layer is in memory twice
        return tensors

    def _stacked(self, tensors: Tensors, name: str) -> mx.array:
        return mx.stack([tensors.pop(f"mlp.experts.{i}.{name}") for i in range(self.config.n_routed_experts)])

    def text(self, ids: list[int]) -> str:
        """Return the text of token ids, <ID> for a control token. A line of tiktoken.model has a token and its id."""
        lines = (line.split() for line in (self.folder / "tiktoken.model").read_bytes().splitlines())
        token_bytes = {int(token_id): base64.b64decode(encoded) for encoded, token_id in lines}
        return b"".join(token_bytes.get(i, f"<{i}>".encode()) for i in ids).decode(errors="replace")


def yarn(config: SimpleNamespace) -> tuple[mx.array, float]:
    """Return rope's frequencies (qk_rope / 2,), and the factor of the attention scores.

    YaRN (arXiv 2309.00071) leaves the fast frequencies unchanged, divides the slow ones by ``factor``, and
    interpolates between the dimensions that turn beta_fast and beta_slow times over the original context.
    """
    rope, dim, theta = config.rope_scaling, config.qk_rope_head_dim, config.rope_theta
    assert rope["mscale"] == rope["mscale_all_dim"], "with other values cosine and sine have a factor"

    def dimension(num_turns: float) -> float:
        original_tokens = rope["original_max_position_embeddings"]
        return float(dim * math.log(original_tokens / (num_turns * 2 * math.pi)) / (2 * math.log(theta)))

    low = max(math.floor(dimension(rope["beta_fast"])), 0)
    high = min(math.ceil(dimension(rope["beta_slow"])), dim - 1)
    slowness = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)  # 0: unchanged, 1: divided
    frequencies = theta ** (-np.arange(0, dim, 2) / dim)
    frequencies = frequencies * (1 - slowness) + frequencies / rope["factor"] * slowness
    temperature = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1
    return mx.array(frequencies, mx.float32), (config.qk_nope_head_dim + dim) ** -0.5 * temperature**2


def rotate(x: mx.array, positions: mx.array, frequencies: mx.array) -> mx.array:
    """Rotate each pair of neighbours in x (..., tokens, qk_rope) by its position times its frequency."""
    angles = positions[:, None] * frequencies
    cosine, sine = mx.cos(angles), mx.sin(angles)
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = mx.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)


class Stage:
    """Consecutive layers of the model and their cache; on the first stage also the embedding, on the last the head."""

    def __init__(self, checkpoint: Checkpoint, rank: int, num_stages: int) -> None:
        self.config, self.dtype = checkpoint.config, checkpoint.dtype
        config = self.config
        bounds = [config.num_hidden_layers * stage // num_stages for stage in range(num_stages + 1)]
        self.layers = [checkpoint.layer(number) for number in range(bounds[rank], bounds[rank + 1])]
        if rank == 0:
            self.embedding = checkpoint.tensors("model.embed_tokens.")["weight"]
        if rank == num_stages - 1:
            self.norm = checkpoint.tensors("model.norm.")["weight"]
            self.head = checkpoint.tensors("lm_head.")["weight"]
        self.frequencies, self.scale = yarn(config)
        row_size = config.kv_lora_rank + config.qk_rope_head_dim
        self.caches = [mx.zeros((0, row_size), self.dtype) for _ in self.layers]  # one row for each position

    def run(self, hidden: mx.array, *, is_prompt: bool) -> mx.array:
        """Run the next positions' hidden states (tokens, hidden) through this stage's layers."""
        for number, layer in enumerate(self.layers):
            normalized = mx.fast.rms_norm(hidden, layer["input_layernorm.weight"], self.config.rms_norm_eps)
            hidden = hidden + self.attention(normalized, layer, number, is_prompt=is_prompt)
            normalized = mx.fast.rms_norm(hidden, layer["post_attention_layernorm.weight"], self.config.rms_norm_eps)
            if "mlp.gate.weight" in layer:
                hidden = hidden + self.experts(normalized, layer) + swiglu(normalized, layer, "mlp.shared_experts")
            else:
                hidden = hidden + swiglu(normalized, layer, "mlp")
        mx.eval(hidden, self.caches)
        return hidden

    def attention(self, x: mx.array, layer: Tensors, number: int, *, is_prompt: bool) -> mx.array:
        """Return multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) of x to all positions up to its own.

        A row of the cache holds a latent vector and one rotated key, which all heads share. Each head's keys and values
        are projections of the latent vectors. A prompt's many queries use the naive form, which computes all keys and
        values once. A single query uses the absorbed form: q . (K c) = (K^T q) . c, so that the query is projected
        instead of every key, and attends to the latent vectors.
        """
        config, heads, nope = self.config, self.config.num_attention_heads, self.config.qk_nope_head_dim
        num_cached = self.caches[number].shape[0]
        positions = mx.arange(num_cached, num_cached + x.shape[0])
        compressed = x @ layer["self_attn.q_a_proj.weight"].T
        compressed = mx.fast.rms_norm(compressed, layer["self_attn.q_a_layernorm.weight"], BOTTLENECK_EPS)
        queries = (compressed @ layer["self_attn.q_b_proj.weight"].T).reshape(x.shape[0], heads, -1).swapaxes(0, 1)
        queries_nope, queries_rope = queries[..., :nope], rotate(queries[..., nope:], positions, self.frequencies)

        latent, key = mx.split(x @ layer["self_attn.kv_a_proj_with_mqa.weight"].T, [config.kv_lora_rank], axis=-1)
        latent = mx.fast.rms_norm(latent, layer["self_attn.kv_a_layernorm.weight"], BOTTLENECK_EPS)
        rows = mx.concatenate([latent, rotate(key, positions, self.frequencies)], axis=-1)
        self.caches[number] = mx.concatenate([self.caches[number], rows])
        latents, rotated_keys = mx.split(self.caches[number], [config.kv_lora_rank], axis=-1)

        per_head = layer["self_attn.kv_b_proj.weight"].reshape(heads, -1, config.kv_lora_rank)
        to_key, to_value = per_head[:, :nope], per_head[:, nope:].swapaxes(-1, -2)
        scores = queries_nope @ (to_key @ latents.T) if is_prompt else (queries_nope @ to_key) @ latents.T
        scores = (scores + queries_rope @ rotated_keys.T) * self.scale
        scores = mx.where(mx.arange(latents.shape[0]) <= positions[:, None], scores, -mx.inf)
        probabilities = mx.softmax(scores, axis=-1, precise=True)
        values = probabilities @ (latents @ to_value) if is_prompt else (probabilities @ latents) @ to_value
        return values.swapaxes(0, 1).flatten(1) @ layer["self_attn.o_proj.weight"].T

    def experts(self, x: mx.array, layer: Tensors) -> mx.array:
        """Return the weighted sum of the outputs of each token's best experts (DeepSeek-V3, arXiv 2412.19437).

        The correction bias, which balances the experts' load in training, changes the choice but not the weights.
        """
        scores = mx.sigmoid(x.astype(mx.float32) @ layer["mlp.gate.weight"].astype(mx.float32).T)
        biased_scores = scores + layer["mlp.gate.e_score_correction_bias"]
        expert_ids = mx.argsort(-biased_scores, axis=-1)[:, : self.config.num_experts_per_tok]
        weights = mx.take_along_axis(scores, expert_ids, axis=-1)
        weights = weights / weights.sum(axis=-1, keepdims=True) * self.config.routed_scaling_factor

        def project(inputs: mx.array, projection: str) -> mx.array:
            packed, scale = (layer[f"experts.{projection}.{part}"] for part in ("weight_packed", "weight_scale"))
            return mx.gather_qmm(inputs, packed, scale, -8 * scale, rhs_indices=expert_ids, group_size=32, bits=4)

        inputs = x[:, None, None]  # (tokens, 1, 1, hidden): one row for each chosen expert of the token
        gate = project(inputs, "gate_proj")
        outputs = project(gate * mx.sigmoid(gate) * project(inputs, "up_proj"), "down_proj").squeeze(2)
        total: mx.array = (outputs * weights[..., None]).sum(axis=1)
        return total.astype(x.dtype)

    def next_token(self, hidden: mx.array) -> mx.array:
        """Return the most likely token after the last position of ``hidden``."""
        return mx.argmax(mx.fast.rms_norm(hidden[-1], self.norm, self.config.rms_norm_eps) @ self.head.T)


def swiglu(x: mx.array, layer: Tensors, name: str) -> mx.array:
    """Return down(silu(gate(x)) * up(x)), the feed-forward block of a dense layer or of a shared expert."""
    gate, up, down = (layer[f"{name}.{part}_proj.weight"].T for part in ("gate", "up", "down"))
    gate_outputs = x @ gate
    return (gate_outputs * mx.sigmoid(gate_outputs) * (x @ up)) @ down


def step(stage: Stage, group: mx.distributed.Group, token_ids: list[int], *, is_prompt: bool) -> mx.array:
    """Receive the tokens' hidden states from the previous rank, run this rank's layers, and send them to the next."""
    rank = group.rank()
    if rank == 0:
        hidden = stage.embedding[mx.array(token_ids)]
    else:
        hidden = mx.distributed.recv((len(token_ids), stage.config.hidden_size), stage.dtype, rank - 1, group=group)
        mx.eval(hidden)  # waits for the hidden states before GPU work that needs them is submitted
    hidden = stage.run(hidden, is_prompt=is_prompt)
    if rank < group.size() - 1:
        mx.eval(mx.distributed.send(hidden, rank + 1, group=group))
    return hidden


def generate(stage: Stage, group: mx.distributed.Group, prompt_ids: list[int], max_tokens: int) -> list[int]:
    """Return the token ids of the greedy answer. All ranks run the same steps in the same order."""
    for start in range(0, len(prompt_ids), CHUNK_TOKENS):
        hidden = step(stage, group, prompt_ids[start : start + CHUNK_TOKENS], is_prompt=True)
    answer: list[int] = []
    while len(answer) < max_tokens:
        is_last = group.rank() == group.size() - 1
        token = stage.next_token(hidden) if is_last else mx.array(0, mx.uint32)
        answer.append(cast(int, mx.distributed.all_sum(token, group=group).item()))  # so that all ranks know the token
        if answer[-1] in np.atleast_1d(stage.config.eos_token_id):
            break
        hidden = step(stage, group, answer[-1:], is_prompt=False)
    return answer


def main() -> None:
    """Answer the prompt; the first rank prints the answer's token ids and text."""
    parser = argparse.ArgumentParser(description="Greedy tokens of a Kimi K2 checkpoint, over the ranks of mlx.launch.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("prompt_ids", type=lambda text: [int(part) for part in text.split(",")], metavar="N,N,...")
    parser.add_argument("--max-tokens", type=int, default=256)
    options = parser.parse_args()
    checkpoint, group = Checkpoint(options.checkpoint), mx.distributed.init()  # one rank without mlx.launch
    answer = generate(Stage(checkpoint, group.rank(), group.size()), group, options.prompt_ids, options.max_tokens)
    if group.rank() == 0:
        print(*answer, sep=",")
        print(checkpoint.text(answer))


if __name__ == "__main__":
    main()
