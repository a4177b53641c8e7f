"""Tests of `--dense-bits`: tokens are sampled with quantized weights, and stages hold as many bytes as predicted."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.cli.main import run
from mlx_k2.weights.inventory import held_bytes, model_specs
from tests.cli.command import CommandLine
from tests.model.chain import Chain, like_a_stage_on_a_cpu
from tests.model.checkpoints import read_config

pytestmark = pytest.mark.timeout(120)

PROMPT = list(range(20, 40))
NUM_TOKENS = 12
GREEDY = ("--token-ids", ",".join(map(str, PROMPT)), "--temperature", "0", "--max-tokens", str(NUM_TOKENS), "--json")


def generate(command_line: CommandLine, model: Path, *arguments: str) -> list[dict[str, Any]]:
    result = command_line.run("generate", "--model", str(model), *GREEDY, *arguments)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("num_stages", [1, 2])
def test_tokens_come_from_the_quantized_weights_and_held_bytes_match_the_inventory(
    command_line: CommandLine, endless_model: Path, num_stages: int
) -> None:
    *tokens, summary = generate(command_line, endless_model, "--dense-bits", "8", "--stages", str(num_stages))
    with like_a_stage_on_a_cpu():
        expected = Chain(endless_model, 1, dense_bits=8).greedy(PROMPT, NUM_TOKENS)
        assert expected != Chain(endless_model, 1).greedy(PROMPT, NUM_TOKENS)
    assert [line["token"] for line in tokens] == expected
    reported_bytes = sum(stage["held_bytes"] for stage in summary["summary"]["stages"])
    assert reported_bytes == held_bytes(model_specs(read_config(endless_model)), compute_bytes=4, dense_bits=8)


def test_dense_bits_4_is_warned_about_and_3_is_refused(endless_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", "--model", str(endless_model), "--dry-run", "--dense-bits")
    assert run([*arguments, "4"]) == 0
    assert "--dense-bits 4 may show in the answers" in capsys.readouterr().err
    assert run([*arguments, "3"]) == 2
    assert "'3' is not one of" in capsys.readouterr().err
