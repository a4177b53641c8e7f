"""Tests of models that `mlx-k2 generate` refuses before any process starts, in one line with the fault and its fix."""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.cli.main import run
from mlx_k2.testing.tiny_config import as_kimi_k25
from tests.advice import follows_advice
from tests.cli.linked_model import link_model, replace_file
from tests.cli.test_bad_input import check_refusal

Change = Callable[[Path], None]
"""A function that changes the model in a folder so that it is refused."""
SHARD = "model-00003-of-000008.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def model(endless_model: Path, tmp_path: Path) -> Path:
    """Return the folder of a model that a test may change. Its files are links: replace a file, never write to it."""
    return link_model(endless_model, tmp_path / "model")


def remove(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def replace(name: str, data: bytes) -> Change:
    return lambda folder: replace_file(folder / name, data)


def edit_config(**changes: Any) -> Change:
    """Return a change of fields of config.json."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_bytes()) | changes
        replace_file(folder / "config.json", json.dumps(fields).encode())

    return change


def truncate_shard(folder: Path) -> None:
    replace_file(folder / SHARD, (folder / SHARD).read_bytes()[:-1000])


def rename_in_index(old: str, new: str | None) -> Change:
    """Return a change of a tensor's name in the index. ``new`` None removes the tensor."""

    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_bytes())
        file = index["weight_map"].pop(old)
        if new is not None:
            index["weight_map"][new] = file
        replace_file(folder / INDEX, json.dumps(index).encode())

    return change


def reverse_shapes(folder: Path) -> None:
    """Reverse the shapes of two matrices in a shard's header. The number of bytes stays the same."""
    data = (folder / SHARD).read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:header_end])
    header["model.layers.2.self_attn.o_proj.weight"]["shape"].reverse()
    header["model.layers.2.self_attn.q_a_proj.weight"]["shape"].reverse()
    encoded = json.dumps(header).encode()
    replace_file(folder / SHARD, len(encoded).to_bytes(8, "little") + encoded + data[header_end:])


def quantization(**weights: Any) -> dict[str, Any]:
    """Return a quantization_config like Kimi K2's, with changed fields in the object "weights" of its group."""
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    groups = {"group_0": {"weights": scheme}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


ADVICE = r"fetch the original INT4 checkpoint instead, for instance moonshotai/Kimi-K2-Thinking \(594 GB\)"
EXPERT_TENSOR = "model.layers.2.mlp.experts.0.up_proj.weight_packed"
BAD_MODELS: dict[str, tuple[Change, str]] = {
    "no config": (remove("config.json"), "holds no config.json: it is not a checkpoint"),
    "config that is not JSON": (replace("config.json", b"{"), "config.json is not a JSON object"),
    "unknown model_type": (
        edit_config(model_type="llama"),
        r"model_type 'llama' is not one that mlx-k2 runs \(kimi_k2",
    ),
    "K3": (edit_config(model_type="kimi_k3"), f"Kimi K3 has another architecture.*{ADVICE}"),
    "FP8": (edit_config(quantization_config={"quant_method": "fp8"}), f"quantized as 'fp8' cannot be read; {ADVICE}"),
    "converted for MLX": (edit_config(quantization={"bits": 4}), f"was converted for MLX; {ADVICE}"),
    "no quantization": (edit_config(quantization_config=None), f"the experts are not INT4; {ADVICE}"),
    "8 bits": (edit_config(quantization_config=quantization(num_bits=8)), f"num_bits 8, not 4; {ADVICE}"),
    "groups of 128": (
        edit_config(quantization_config=quantization(group_size=128)),
        f"group_size 128, not 32; {ADVICE}",
    ),
    "asymmetric": (edit_config(quantization_config=quantization(symmetric=False)), "symmetric False, not True"),
    "unknown rope type": (edit_config(rope_scaling={"type": "linear"}), "unknown rope_scaling type 'linear'"),
    "no rope": (edit_config(rope_scaling=None), "rope_scaling is missing"),
    "a missing field": (edit_config(kv_lora_rank=None), "config.json: .*kv_lora_rank"),
    "softmax router": (edit_config(scoring_func="softmax"), "scoring_func 'softmax' is not implemented"),
    "K2.5 without its text model": (edit_config(model_type="kimi_k25"), "a kimi_k25 config needs a text_config object"),
    "no index": (remove(INDEX), "holds no weights: neither model.safetensors.index.json nor"),
    "index that is not JSON": (replace(INDEX, b"{"), "is not an index of safetensors files"),
    "index that leaves the folder": (
        replace(INDEX, b'{"weight_map": {"x": "../x.safetensors"}}'),
        r"names '\.\./x.safetensors', which is not a .safetensors file in its folder",
    ),
    "MLX's names": (
        rename_in_index(EXPERT_TENSOR, "model.layers.2.mlp.switch_mlp.up_proj.weight"),
        r"switch_mlp.*was converted for MLX; fetch the original instead, for instance moonshotai/\S+ \(594 GB\)",
    ),
    "missing tensor": (
        rename_in_index(EXPERT_TENSOR, None),
        f"lacks the tensor {re.escape(EXPERT_TENSOR)} that config.json requires",
    ),
    "missing shard": (remove(SHARD), f"{SHARD} is missing: "),
    "truncated shard": (truncate_shard, f"{SHARD} is truncated: 1000 of its .* bytes are missing; fetch it again"),
    "a shard that is an HTML page": (replace(SHARD, b"<html>not found</html>"), f"{SHARD}: it is an HTML page"),
    "misshapen tensor": (
        reverse_shapes,
        r"model.layers.2.self_attn.\w+.weight has shape \[\d+, \d+\], and config.json requires",
    ),
    "no tokenizer": (remove("tiktoken.model"), "the model has no tiktoken.model: fetch"),
    "no special tokens": (remove("tokenizer_config.json"), "the model has no tokenizer_config.json: fetch"),
    "no chat template": (remove("chat_template.jinja"), "no chat template: give --raw to send the prompt unchanged"),
    "broken chat template": (replace("chat_template.jinja", b"{% if %}"), "chat_template.jinja line 1: "),
    "broken generation config": (replace("generation_config.json", b"{"), "generation_config.json cannot be read"),
    "a recommended value out of range": (
        replace("generation_config.json", b'{"temperature": 99}'),
        "temperature 99.* is out of range: give a value from 0",
    ),
}


@pytest.mark.parametrize(("change", "error"), BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_a_bad_model_is_refused(change: Change, error: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(model)
    check_refusal(["--model", str(model), "Hello"], error, capsys)


def test_a_missing_tensor_of_k25_is_named_with_its_prefix(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = as_kimi_k25(json.loads((model / "config.json").read_bytes()))
    replace_file(model / "config.json", json.dumps(fields).encode())
    check_refusal(["--model", str(model), "Hello"], r"lacks language_model.model.embed_tokens.weight and \d+ ", capsys)


def test_a_missing_model_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = "/none is not a folder: give the folder of a checkpoint, or a repository on the Hub"
    check_refusal(["--model", str(tmp_path / "none"), "Hello"], error, capsys)


@follows_advice(
    "model: the path /models/k2 is not UTF-8: rename the folder",
)
@pytest.mark.skipif(sys.platform == "darwin", reason="needs Linux: APFS refuses such names")
def test_a_model_folder_that_is_not_utf_8_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model.rename(tmp_path / os.fsdecode(b"model-\xff"))
    check_refusal(["--model", str(folder), "Hello"], r"the path .*model-\ufffd is not UTF-8", capsys)
    assert run(["generate", "--model", str(folder.rename(tmp_path / "model")), "--dry-run"]) == 0
