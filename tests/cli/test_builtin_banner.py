"""Tests of the built-in model's banner and prompts, and of its calls of the tools in examples/tools.py."""

import datetime
import math
import re
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from mlx_k2.builtin import BANNER, BUILTIN_FOLDER, PROMPTS
from mlx_k2.weights.checkpoint import describe_model, read_small_files
from mlx_k2.weights.inventory import INT4_PER_WORD, embedding_specs, head_specs, layer_specs
from tests.cli.command import CommandLine

TOOLS = Path(__file__).parents[2] / "examples" / "tools.py"


def test_the_banner_has_the_number_of_weights_and_the_bytes_of_the_built_in_model() -> None:
    config = describe_model(read_small_files(BUILTIN_FOLDER), "built-in").config
    specs = [spec for layer in range(config.num_hidden_layers) for spec in layer_specs(config, layer)]
    num_weights = 0
    for spec in (*specs, *embedding_specs(config), *head_specs(config)):
        if not spec.name.endswith(("weight_scale", "weight_shape")):
            weights_per_element = INT4_PER_WORD if spec.name.endswith("weight_packed") else 1
            num_weights += math.prod(spec.shape) * weights_per_element
    num_bytes = sum(file.stat().st_size for file in BUILTIN_FOLDER.iterdir())
    assert f"{num_weights / 1e6:.1f} million weights in {num_bytes / 1e6:.1f} MB" in BANNER[0]


@pytest.mark.slow
def test_the_chat_shows_the_banner_and_the_model_answers_its_prompts(command_line: CommandLine) -> None:
    result = command_line.run("chat", stdin="\n/reset\n".join(PROMPTS) + "\n")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[: len(BANNER)] == list(BANNER)
    assert result.stdout.splitlines() == [
        "17 + 25 = 42",
        ", ".join(map(str, range(3, 13))),
        "mlx-k2 runs Kimi K2 models over several Macs: each Mac holds some of the layers.",
    ]


@pytest.mark.slow
def test_the_built_in_model_calls_each_tool_of_the_example(command_line: CommandLine) -> None:
    questions = re.findall(r'"([^"\n]+\?)"', TOOLS.read_text())
    assert len(questions) == 3
    before = datetime.datetime.now(ZoneInfo("Europe/Rome"))
    result = command_line.run("chat", "--tools", str(TOOLS), "--yes", stdin="\n/reset\n".join(questions) + "\n")
    after = datetime.datetime.now(ZoneInfo("Europe/Rome"))
    assert result.returncode == 0, result.stderr
    time, *others = result.stdout.splitlines()
    assert time in (f"In Rome it is {before:%H:%M}.", f"In Rome it is {after:%H:%M}.")
    assert others == ["The lamp costs 30 coins.", "There are 61 of the cup in stock."]
