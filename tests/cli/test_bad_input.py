"""Tests of bad input to `mlx-k2 generate`: each fault gives one line with the fault and its fix, and an exit code.

All these faults are found before any process starts. Faults that only a stage can find are in
test_stage_failures.py.
"""

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
from tests.local_cluster import CONTEXT_TOKENS, VOCAB_SIZE, write_model
from tests.processes import started_processes

Damage = Callable[[Path], None]
SHARD = "model-00003-of-000008.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def model(intact: Path, tmp_path: Path) -> Path:
    """Return a copy of the model that a test may damage. Its files are links: replace a file, never write to it."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in intact.iterdir():
        (copy / file.name).symlink_to(file)
    return copy


def check_refusal(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], exit_code: int = 2) -> None:
    """Check that the command exits with ``exit_code``, one stderr line like ``words``, no stdout and no process."""
    before = started_processes()
    assert run(["generate", *arguments]) == exit_code
    reported = capsys.readouterr()
    assert reported.out == ""
    assert re.search(words, reported.err), reported.err
    assert reported.err.startswith("error: ") and reported.err.count("\n") == 1, reported.err
    assert started_processes() == before


def host(name: str = "127.0.0.1", **keys: Any) -> dict[str, Any]:
    return {"ssh": name, "ips": ["127.0.0.1"], **keys}


HOSTFILES: dict[str, tuple[object, str]] = {
    "not JSON": ("[{]", "hosts.json is not JSON: "),
    "empty": ("", "hosts.json is not JSON: "),
    "no hosts": ([], "hosts.json lists no hosts: write for instance"),
    "an object without hosts": ({"backend": "ring"}, "hosts.json lists no hosts"),
    "a host without a name": ([{"ips": ["127.0.0.1"]}], "missing required field `ssh`"),
    "a name that is an option": ([host("-oProxyCommand=x")], "'-oProxyCommand=x' is not a host name"),
    "no ips for ring": ([host(), {"ssh": "mac-2"}], r"host 1 \(mac-2\) has no ips, which backend ring needs: add"),
    "unequal ips": ([host(), host(ips=["10.0.0.1", "10.0.0.2"])], "has 2 ips and host 0"),
    "a name in place of an ip": ([host(ips=["mac-1"])], "'mac-1': give an IPv4 address"),
    "an unknown backend": ({"backend": "mpi", "hosts": [host()]}, "does not run over backend 'mpi': write one of"),
    "an rdma matrix of the wrong shape": (
        {"backend": "jaccl", "hosts": [host(rdma=[None, "rdma_en5"]), host(rdma=["rdma_en5"])]},
        r"host 1 .*: rdma has 1 entries for 2 hosts",
    ),
    "no rdma at all": ({"backend": "jaccl", "hosts": [host(), host()]}, "rdma has 0 entries for 2 hosts"),
    "the same ip and port twice": (
        [host(ips=["127.0.0.1:5000"]), host(ips=["127.0.0.1:5000"])],
        r"host 1 .* lists 127.0.0.1:5000, which host 0 .* has already: give each its own port",
    ),
    "more hosts than layers": ([host()] * 8, "there are 8 hosts and the model has 7 layers: use at most 7"),
    "a host that is too small": ([host(memory_gb=0.001)], "the model does not fit: weights and cache need"),
    "environment lines that are none": ({"envs": ["X"], "hosts": [host()]}, 'envs must be a list of lines like "NAME'),
}


@pytest.mark.parametrize(("content", "words"), HOSTFILES.values(), ids=HOSTFILES.keys())
def test_a_bad_hostfile_is_refused(
    content: object, words: str, intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hosts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    check_refusal(["--hostfile", str(path), "--model", str(intact), "Hello"], words, capsys)


def test_a_missing_hostfile_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "cannot read the hostfile .*/none.json: No such file or directory"
    check_refusal(["--hostfile", str(tmp_path / "none.json"), "Hello"], words, capsys)


def test_stages_and_a_hostfile_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    words = "a number of stages is for runs on this machine alone: give it, or a hostfile, not both"
    check_refusal(["--hostfile", "hosts.json", "--stages", "2", "Hello"], words, capsys)


def replaced(name: str, content: bytes | None) -> Damage:
    """Return a damage that replaces a file. ``content`` None removes the file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)

    return damage


def config(**changes: Any) -> Damage:
    """Return a damage that changes fields of config.json."""

    def damage(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_bytes()) | changes
        replaced("config.json", json.dumps(fields).encode())(folder)

    return damage


def truncated(folder: Path) -> None:
    replaced(SHARD, (folder / SHARD).read_bytes()[:-1000])(folder)


def renamed_in_index(old: str, new: str | None) -> Damage:
    """Return a damage that renames a tensor in the index. ``new`` None removes the tensor."""

    def damage(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_bytes())
        file = index["weight_map"].pop(old)
        index["weight_map"] |= {} if new is None else {new: file}
        replaced(INDEX, json.dumps(index).encode())(folder)

    return damage


def reshaped(folder: Path) -> None:
    """Reverse the shapes of two matrices in a shard's header. The number of bytes stays the same."""
    data = (folder / SHARD).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["model.layers.2.self_attn.o_proj.weight"]["shape"].reverse()
    header["model.layers.2.self_attn.q_a_proj.weight"]["shape"].reverse()
    raw = json.dumps(header).encode()
    replaced(SHARD, len(raw).to_bytes(8, "little") + raw + data[end:])(folder)


def quantization(**weights: Any) -> dict[str, Any]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32} | weights
    groups = {"group_0": {"weights": scheme}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


ORIGINAL = r"fetch the original INT4 checkpoint instead, for instance moonshotai/Kimi-K2-Thinking \(594 GB\)"
EXPERT = "model.layers.2.mlp.experts.0.up_proj.weight_packed"
MODELS: dict[str, tuple[Damage, str]] = {
    "no config": (replaced("config.json", None), "holds no config.json: it is not a checkpoint"),
    "config that is not JSON": (replaced("config.json", b"{"), "config.json is not a JSON object"),
    "unknown model_type": (config(model_type="llama"), r"model_type 'llama' is not one that mlx-k2 runs \(kimi_k2"),
    "K3": (config(model_type="kimi_k3"), f"Kimi K3 has another architecture.*{ORIGINAL}"),
    "FP8": (config(quantization_config={"quant_method": "fp8"}), f"quantized as 'fp8' cannot be read; {ORIGINAL}"),
    "converted for MLX": (config(quantization={"bits": 4}), f"was converted for MLX; {ORIGINAL}"),
    "no quantization": (config(quantization_config=None), f"the experts are not INT4; {ORIGINAL}"),
    "8 bits": (config(quantization_config=quantization(num_bits=8)), f"num_bits 8, not 4; {ORIGINAL}"),
    "groups of 128": (config(quantization_config=quantization(group_size=128)), f"group_size 128, not 32; {ORIGINAL}"),
    "asymmetric": (config(quantization_config=quantization(symmetric=False)), "symmetric False, not True"),
    "unknown rope type": (config(rope_scaling={"type": "linear"}), "unknown rope_scaling type 'linear'"),
    "no rope": (config(rope_scaling=None), "rope_scaling is missing"),
    "a missing field": (config(kv_lora_rank=None), "config.json: .*kv_lora_rank"),
    "softmax router": (config(scoring_func="softmax"), "scoring_func 'softmax' is not implemented"),
    "K2.5 without its text model": (config(model_type="kimi_k25"), "a kimi_k25 config needs a text_config object"),
    "no index": (replaced(INDEX, None), "holds no weights: neither model.safetensors.index.json nor"),
    "index that is not JSON": (replaced(INDEX, b"{"), "is not an index of safetensors files"),
    "index that leaves the folder": (
        replaced(INDEX, b'{"weight_map": {"x": "../x.safetensors"}}'),
        r"names '\.\./x.safetensors', which is not a .safetensors file in its folder",
    ),
    "MLX's names": (
        renamed_in_index(EXPERT, "model.layers.2.mlp.switch_mlp.up_proj.weight"),
        r"switch_mlp.*was converted for MLX; fetch the original instead, for instance moonshotai/\S+ \(594 GB\)",
    ),
    "missing tensor": (
        renamed_in_index(EXPERT, None),
        f"lacks the tensor {re.escape(EXPERT)} that config.json requires",
    ),
    "missing shard": (replaced(SHARD, None), f"{SHARD} is missing: "),
    "truncated shard": (truncated, f"{SHARD} is truncated: 1000 of its .* bytes are missing; fetch it again"),
    "a shard that is none": (replaced(SHARD, b"<html>not found</html>"), f"{SHARD}: it is an HTML page"),
    "misshapen tensor": (
        reshaped,
        r"model.layers.2.self_attn.\w+.weight has shape \[\d+, \d+\], and config.json requires",
    ),
    "no tokenizer": (replaced("tiktoken.model", None), "the model has no tiktoken.model: fetch"),
    "no special tokens": (replaced("tokenizer_config.json", None), "the model has no tokenizer_config.json: fetch"),
    "no chat template": (
        replaced("chat_template.jinja", None),
        "no chat template: give --raw to send the prompt unchanged",
    ),
    "broken chat template": (replaced("chat_template.jinja", b"{% if %}"), "chat_template.jinja line 1: "),
    "broken generation config": (replaced("generation_config.json", b"{"), "generation_config.json cannot be read"),
    "a recommended value out of range": (
        replaced("generation_config.json", b'{"temperature": 99}'),
        "temperature 99.* is out of range: give a value from 0",
    ),
}


@pytest.mark.parametrize(("damage", "words"), MODELS.values(), ids=MODELS.keys())
def test_a_model_that_cannot_be_run_is_refused(
    damage: Damage, words: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    check_refusal(["--model", str(model), "Hello"], words, capsys)


def test_a_damaged_k25_model_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = as_kimi_k25(json.loads((model / "config.json").read_bytes()))
    replaced("config.json", json.dumps(fields).encode())(model)
    check_refusal(["--model", str(model), "Hello"], "lacks language_model.model.embed_tokens.weight and", capsys)


def test_a_missing_model_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "/none is not a folder: give the folder of a checkpoint, or a repository on the Hub"
    check_refusal(["--model", str(tmp_path / "none"), "Hello"], words, capsys)


@follows_advice(
    "model: the path a is not UTF-8: rename the folder, or give a link to it",
)
@pytest.mark.skipif(sys.platform == "darwin", reason="needs Linux: APFS refuses such names")
def test_a_model_folder_whose_path_is_not_utf_8_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model.rename(tmp_path / os.fsdecode(b"model-\xff"))
    check_refusal(["--model", str(folder), "Hello"], r"the path .*model-\ufffd is not UTF-8", capsys)


REQUESTS: dict[str, tuple[list[str], str]] = {
    "empty prompt": ([""], "the prompt is empty: give some text"),
    "blank prompt": ([" \n"], "the prompt is empty: give some text"),
    "no token ids": (["--token-ids", ""], "--token-ids: '' is not a whole number from 0: write numbers with commas"),
    "token ids with a word": (["--token-ids", "3,x"], "--token-ids: 'x' is not a whole number from 0"),
    "token ids with a gap": (["--token-ids", "3,,4"], "--token-ids: '' is not a whole number from 0"),
    "negative token id": (["--token-ids", "-3"], "--token-ids: '-3' is not a whole number from 0"),
    "token id of a thousand digits": (
        ["--token-ids", "9" * 5000],
        "--token-ids: '9999999999' is not a whole number from 0",
    ),
    "unknown token id": (["--token-ids", f"3,{VOCAB_SIZE}"], f"token id {VOCAB_SIZE} is outside the vocabulary of 768"),
    "token ids and a prompt": (["--token-ids", "3", "Hello"], "--token-ids is the whole prompt: leave out PROMPT"),
    "raw and a system prompt": (["--raw", "--system", "x", "Hello"], "--raw sends only PROMPT: leave out --system"),
    "prompt without room": (["--raw", "x" * 3000], r"has 3000 tokens and the context holds 2048.*larger --context"),
    "small context": (["--context", "8", "Hello"], r"the context holds 8, so there is no room for an answer"),
    "large context": (["--context", "2049", "Hello"], f"--context 2049 is more than the {CONTEXT_TOKENS} positions"),
    "temperature": (
        ["--temperature", "-1", "Hello"],
        r"temperature -1.0 is out of range: give a value from 0 \(greedy",
    ),
    "temperature nan": (["--temperature", "nan", "Hello"], "temperature nan is out of range"),
    "top-p": (["--top-p", "1.5", "Hello"], "top-p 1.5 is out of range: give a value above 0, at most 1"),
    "top-k": (["--top-k", "-1", "Hello"], "top-k -1 is out of range: give a value at least 1"),
    "min-p": (["--min-p", "1", "Hello"], "min-p 1.0 is out of range: give a value at least 0, below 1"),
    "repetition penalty": (["--repetition-penalty", "0", "Hello"], "repetition-penalty 0.0 is out of range"),
    "seed": (["--seed", "-2", "Hello"], "seed -2 is out of range: give a value from 0"),
    "logprobs": (["--json", "--logprobs", "101", "Hello"], "logprobs 101 is out of range: give a value from 0 to 100"),
    "an empty stop string": (["--stop", "", "Hello"], "a stop string is empty"),
    "an expression that is not UTF-8": (
        ["--regex", "\udce9", "Hello"],
        "regular expression or grammar is not UTF-8 text",
    ),
    "a bias outside the vocabulary": (["--logit-bias", "768=1", "Hello"], "for token id 768, outside the vocabulary"),
    "a bias without a number": (["--logit-bias", "5", "Hello"], "--logit-bias '5': write a token id and a number"),
    "two biases of a token": (["--logit-bias", "5=1", "--logit-bias", "5=2", "Hello"], "token 5 has a bias already"),
    "a large penalty": (["--presence-penalty", "3", "Hello"], "presence-penalty 3.0 is out of range"),
    "a schema that is not there": (["--json-schema", "/missing", "Hello"], "--json-schema: /missing cannot be read"),
    "a schema that is no JSON": (
        ["--json-schema", __file__, "Hello"],
        "--json-schema: .* line 1, column 3: extra data",
    ),
    "a malformed regular expression": (["--regex", "(", "Hello"], "the regular expression cannot be compiled"),
    "a catastrophic pattern": (["--regex", "(a?){400}a{400}", "Hello"], "it allows no text, or is too complex"),
    "a malformed grammar": (["--lark", __file__, "Hello"], "the Lark grammar cannot be compiled"),
    "two forms": (["--regex", "a", "--lark", __file__, "Hello"], "an answer has one form"),
    "a tool without tools": (["--tool-choice", "clock", "Hello"], "tool_choice names 'clock', which is not declared"),
    "a required call without tools": (["--tool-choice", "required", "Hello"], "no tool is declared"),
    "lease nan": (["--lease", "nan", "Hello"], "lease nan is out of range: give 2 to 3600 s"),
    "short lease": (["--lease", "1.9", "Hello"], "lease 1.9 is out of range"),
    "long lease": (["--lease", "3601", "Hello"], "lease 3601 is out of range"),
    "timeout": (["--timeout", "0", "Hello"], "timeout is 0 s: give more than 0"),
    "timeout nan": (["--timeout", "nan", "Hello"], "timeout is nan s"),
    "revision of a folder": (["--revision", "main", "Hello"], "a revision is for a repository on the Hub"),
    "split with a word": (["--split", "3,x", "Hello"], "--split: 'x' is not a whole number from 1"),
    "split of other stages": (["--split", "7", "--stages", "2", "Hello"], "--split 7 names 1 stages, and there are 2"),
    "split of other layers": (["--split", "3,3", "--stages", "2", "Hello"], "assigns 6 layers: it must assign 7"),
    "split with a stage without layers": (
        ["--split", "7,0", "--stages", "2", "Hello"],
        "--split: '0' is not a whole number from 1",
    ),
    "more stages than layers": (["--stages", "8", "Hello"], "the model has 7 layers: use at most 7 hosts"),
}


@pytest.mark.parametrize(("arguments", "words"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_that_cannot_run_is_refused(
    arguments: list[str], words: str, intact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_refusal(["--model", str(intact), *arguments], words, capsys)


SCHEMAS: dict[str, tuple[object, str]] = {
    "a list": ([1], "json_schema"),
    "an unknown type": ({"type": "thing"}, "the JSON schema cannot be enforced: Invalid type: thing"),
    "a remote reference": ({"$ref": "https://a.example/b.json"}, "does not fetch resources"),
    "recursion without end": (
        {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
        "the JSON schema has no finite value: it refers to itself without end",
    ),
    "a catastrophic pattern": ({"type": "string", "pattern": "^(a?){400}a{400}$"}, "allows no text, or is too complex"),
    "5 MB": ({"enum": ["x" * 5_000_000]}, "the JSON schema is larger than 262144 bytes"),
    "an unknown keyword, with --strict-schema": (
        {"type": "array", "uniqueItems": True},
        "the JSON schema cannot be enforced: .*uniqueItems",
    ),
}


@pytest.mark.parametrize(("schema", "words"), SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_that_cannot_be_used_is_refused(
    schema: object, words: str, intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    asked = ["--model", str(intact), "--json-schema", str(tmp_path / "schema.json"), "--strict-schema", "Hello"]
    check_refusal(asked, words, capsys)


def test_a_tool_choice_that_names_no_tool_of_the_file_is_refused(
    intact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.py").write_text('def clock() -> str:\n    """Return the time."""\n    return "noon"\n')
    arguments = ["--model", str(intact), "--tools", str(tmp_path / "tools.py"), "--tool-choice", "nosuch", "Hello"]
    check_refusal(arguments, "tool_choice names 'nosuch', which is not declared; declared tools: clock", capsys)


USAGE: dict[str, tuple[list[str], str]] = {
    "an unknown option": (["generate", "--tempertaure", "1"], "No such option '?--tempertaure"),
    "an unknown command": (["genrate"], "there is no command 'genrate': did you mean generate\\?"),
    "a word for a number": (["generate", "--max-tokens", "x", "Hello"], "Invalid value for '--max-tokens'"),
    "no token to generate": (["generate", "--max-tokens", "0", "Hello"], "Invalid value for '--max-tokens' / '-n': 0"),
    "an unknown dtype": (["generate", "--dtype", "int8", "Hello"], "'int8' is not one of 'bfloat16', 'float32'"),
    "log-probabilities without JSON": (["generate", "--logprobs", "3", "Hello"], "add --json"),
    "several answers with tools": (
        ["generate", "--num-answers", "2", "--tools", "x.py", "Hello"],
        "goes without --tools",
    ),
    "no answer": (["generate", "--num-answers", "0", "Hello"], "Invalid value for '--num-answers': 0"),
    "ten thousand answers": (["generate", "--num-answers", "10000", "Hello"], "not in the range 1<=x<=128"),
    "two prompts": (["generate", "Hello", "there"], "unexpected extra argument"),
    "no command": ([], "Usage: mlx-k2"),
}


@pytest.mark.parametrize(("arguments", "words"), USAGE.values(), ids=USAGE.keys())
def test_an_invalid_command_line_prints_the_usage_and_exits_with_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    reported = capsys.readouterr()
    assert reported.out == ""
    assert re.search(words, reported.err), reported.err
    assert "Usage: mlx-k2" in reported.err
