"""Tests of examples/mini_pipeline.py: it is short, needs mlx and numpy only, and gives `mlx-k2 generate`'s tokens."""

import ast
import contextlib
import json
import random
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.tested_on import ANSWER
from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import as_kimi_k25, tiny_config_fields
from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from tests.cli.command import MLX_K2

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "mini_pipeline.py"
MAX_LINES = 250
VOCAB_SIZE = 768
LONG_PROMPT = ",".join(str((7 + 31 * position) % 256) for position in range(600))  # more than one chunk
MAX_TOKENS = 24


def write_model(folder: Path, fields: dict[str, Any], seed: int) -> Path:
    """Write a checkpoint with random weights for the fields of a config.json."""
    files = tiny_vocabulary(VOCAB_SIZE, 2048).files | {"generation_config.json": b"{}"}
    write_random_checkpoint(folder, fields, seed, files)
    return folder


def write_thinking(folder: Path) -> Path:
    return write_model(folder, tiny_config_fields(VOCAB_SIZE, max_position_embeddings=2048), seed=20)


def write_k25(folder: Path) -> Path:
    fields = tiny_config_fields(VOCAB_SIZE, max_position_embeddings=2048)
    fields["rope_scaling"] = {**fields["rope_scaling"], "beta_fast": 32.0}  # as in K2.5's config.json
    return write_model(folder, as_kimi_k25(fields), seed=21)  # the weights of this seed sample no stop token


CHECKPOINTS: dict[str, tuple[Callable[[Path], Path], str]] = {  # a writer of the checkpoint, and token ids of a prompt
    "built-in": (lambda _: BUILTIN_FOLDER, "1795,301,1809,569,379,509,504,50,63,1794,1796,284,1809"),
    "random K2-Thinking": (write_thinking, LONG_PROMPT),
    "random K2.5": (write_k25, LONG_PROMPT),
}


def output_of(command: list[str]) -> str:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout, result.stderr  # mlx.launch returns 0 also after a failed rank
    return result.stdout


def example_tokens(folder: Path, prompt_ids: str, num_ranks: int) -> list[int]:
    """Return the token ids that the example generates with one process for each rank."""
    command = [sys.executable, str(EXAMPLE), str(folder), prompt_ids, "--max-tokens", str(MAX_TOKENS)]
    if num_ranks > 1:
        port = str(first_free_port(num_ranks))
        launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(num_ranks), "--starting-port", port]
        command = [*launch, *command]
    return [int(token) for token in output_of(command).splitlines()[0].split(",")]


def first_free_port(count: int) -> int:
    """Return the first of ``count`` consecutive free ports, outside the range from which the system chooses."""
    while True:
        first = random.randrange(20_000, 30_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as sockets:
            for port in range(first, first + count):
                sockets.enter_context(socket.create_server(("127.0.0.1", port)))
            return first


def generate_tokens(folder: Path, prompt_ids: str, num_stages: int) -> list[int]:
    """Return the token ids that `mlx-k2 generate` samples."""
    command = [MLX_K2, "generate", "--model", str(folder), "--stages", str(num_stages), "--token-ids", prompt_ids]
    lines = output_of([*command, "--temperature", "0", "--max-tokens", str(MAX_TOKENS), "--json"]).splitlines()
    return [json.loads(line)["token"] for line in lines[:-1]]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_examples_greedy_tokens_equal_generates_tokens(tmp_path: Path, name: str, num_ranks: int) -> None:
    write, prompt_ids = CHECKPOINTS[name]
    folder = write(tmp_path / "checkpoint")
    tokens = example_tokens(folder, prompt_ids, num_ranks)
    assert tokens == generate_tokens(folder, prompt_ids, num_ranks)
    assert len(set(tokens)) > 3, "the answer repeats a few tokens"
    assert len(tokens) == MAX_TOKENS


def test_the_command_in_the_examples_docstring_answers_its_question() -> None:
    (command,) = re.findall(r"^    (python .*)$", EXAMPLE.read_text(), re.MULTILINE)
    ids, text = output_of([sys.executable, *shlex.split(command)[1:]]).splitlines()
    assert ids.endswith(",1794")  # <|im_end|>
    assert "</think>" not in text  # a control token is printed as its id
    assert text.endswith(f"{ANSWER}<1794>")


def test_the_example_has_at_most_250_lines_and_imports_mlx_and_numpy_only() -> None:
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) <= MAX_LINES
    nodes = list(ast.walk(ast.parse(source)))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    others = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert others == {"mlx", "numpy"}
