"""Test of runs with Kimi's vocabulary: the stages compute the token ids of the checkpoints' own tokenizers."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import as_kimi_k25, tiny_config_fields
from tests.cli.command import CommandLine
from tests.cli.linked_model import link_model
from tests.text.fixtures import ids_of
from tests.text.kimi import (
    MODELS,
    VOCAB_SIZE,
    golden_prompts,
    kimi_tokenizer,
    needs_vocabulary,
    template,
    template_source,
    vocabulary,
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random model with K2.5's layout, Kimi's vocabulary and two narrow layers, without a chat template."""
    fields = tiny_config_fields(VOCAB_SIZE, num_hidden_layers=2, hidden_size=64, max_position_embeddings=8192)
    folder = tmp_path_factory.mktemp("kimi") / "model"
    write_random_checkpoint(folder, as_kimi_k25(fields), seed=20, tokenizer_files=vocabulary())
    return folder


def prompt_line(prompt: dict[str, Any]) -> dict[str, Any]:
    return {"id": prompt["id"], "messages": prompt["messages"], "tools": prompt["tools"], **prompt["flags"]}


@pytest.mark.slow
@needs_vocabulary
@pytest.mark.parametrize("model", MODELS)
def test_a_run_of_many_prompts_computes_the_ids_of_the_checkpoints_tokenizer(
    model: str, weights: Path, tmp_path: Path, command_line: CommandLine
) -> None:
    folder = link_model(weights, tmp_path / model)
    (folder / "chat_template.jinja").write_text(template_source(model))
    known_flags = {"thinking", "preserve_thinking"} & template(model).variables
    prompts = [  # without images, and with flags that a line of a file of prompts can have
        prompt
        for prompt in golden_prompts(model)
        if "ids_sha256" in prompt and prompt["group"] != "vision" and prompt["flags"].keys() <= known_flags
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(prompt_line(prompt))}\n" for prompt in prompts))
    out, log = tmp_path / "results.jsonl", tmp_path / "log"
    result = command_line.run(
        *("generate", "--model", str(folder), "--prompts", str(file), "--out", str(out), "--max-tokens", "1"),
        *("--log-dir", str(log), "--log-tokens"),
    )
    assert result.returncode == 0, result.stderr
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert [result["usage"]["prompt_tokens"] for result in results] == [prompt["num_ids"] for prompt in prompts]
    steps = [json.loads(line) for line in (log / "steps.jsonl").read_text().splitlines()]
    rows = [row for step in steps for row in step["rows"] if row["prompt"]]
    for prompt in prompts:
        ids = ids_of(template(model), kimi_tokenizer(), prompt["messages"], prompt["tools"], **prompt["flags"])
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == prompt["ids_sha256"]
        last_rows = [row for row in rows if row["position"] + len(row["tokens"]) == len(ids)]
        # Positions before such a row may have been computed for another prompt with the same prefix.
        assert any(row["tokens"] == ids[row["position"] :] for row in last_rows), prompt["id"]
