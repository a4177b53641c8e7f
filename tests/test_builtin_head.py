"""Tests of the built-in model's draft head on the model's own answers to held-out questions.

The answers, and the positions that the head drafts right, come from training/, whose code for model and head is not
the program's.
"""

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import mlx.core as mx
import pytest

from mlx_k2.builtin import BUILTIN_FOLDER, BUILTIN_HEAD_FOLDER
from mlx_k2.cluster.hostfile import local_hostfile
from mlx_k2.coordinator.engine import Engine, engine_on
from mlx_k2.coordinator.handle import Finished
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest, open_source
from mlx_k2.deployment.deploy import deploy
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import Request
from mlx_k2.weights.model_source import BUILTIN, BUILTIN_HEAD, DraftHead, ModelSource
from training.draft.answers import AUX_LAYERS, held_out_prompts, make_file
from training.draft.data import Row, read_rows
from training.draft.measure import Position, positions
from training.draft.target import Target
from training.draft.train import read_weights
from training.vocabulary import load_encoding

IS_LONG = hypothesis.settings.get_current_profile_name() == "long"
PROMPT_STRIDE = 1 if IS_LONG else 20
"""Every PROMPT_STRIDE-th of the 200 held-out prompts is used."""
STOP_ID = load_encoding(BUILTIN_FOLDER / "tiktoken.model").encode_single_token("<|im_end|>")


def answers(folder: Path, aux_layers: tuple[int, ...]) -> list[Row]:
    """Return the model's answers at temperatures 0 and 1, with the outputs of ``aux_layers``."""
    path = folder / "answers.safetensors"
    make_file(Target(aux_layers), path, list(held_out_prompts().values())[::PROMPT_STRIDE], seed=0, is_split=False)
    return read_rows([path])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return answers(tmp_path_factory.mktemp("answers"), AUX_LAYERS)


def drafted_positions(rows: list[Row]) -> list[Position]:
    """Return the positions of the answers, with what the head and n-grams draft there."""
    return list(positions([("any skill", row) for row in rows], read_weights(BUILTIN_HEAD_FOLDER)))


def accuracy(drafted: list[Position], temperature: int, field: str) -> float:
    """Return the fraction of the positions at a temperature where ``field`` (is_head_right, is_ngram_right) is true."""
    results = [bool(getattr(position, field)) for position in drafted if position.temperature == temperature]
    return sum(results) / len(results)


@pytest.mark.slow
@pytest.mark.timeout(900 if IS_LONG else 120)
def test_the_head_is_right_for_most_positions_and_clearly_more_often_than_ngrams(rows: list[Row]) -> None:
    drafted = drafted_positions(rows)
    for temperature, min_accuracy in ((0, 0.6), (1, 0.5)):
        assert accuracy(drafted, temperature, "is_head_right") >= min_accuracy
        assert accuracy(drafted, temperature, "is_head_right") >= accuracy(drafted, temperature, "is_ngram_right") + 0.1


@pytest.mark.slow
@pytest.mark.timeout(900 if IS_LONG else 120)
def test_outputs_of_layers_that_are_off_by_one_lower_the_accuracy(rows: list[Row], tmp_path: Path) -> None:
    shifted_rows = answers(tmp_path, tuple(layer + 1 for layer in AUX_LAYERS))
    shifted_accuracy = accuracy(drafted_positions(shifted_rows), 0, "is_head_right")
    assert shifted_accuracy <= accuracy(drafted_positions(rows), 0, "is_head_right") - 0.05


def test_the_heads_file_has_at_most_1_5_mb_tensor_names_of_published_heads_and_no_output_projection() -> None:
    assert (BUILTIN_HEAD_FOLDER / "model.safetensors").stat().st_size <= 1.5e6
    names = set(mx.load(str(BUILTIN_HEAD_FOLDER / "model.safetensors")))
    assert {"fc.weight", "norm.weight", "layers.0.hidden_norm.weight"} < names
    assert "lm_head.weight" not in names


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    head = DraftHead(source=ModelSource(path_or_repo=BUILTIN_HEAD))
    options = ClusterOptions(context_tokens=1024, dtype="float32")
    source = ModelSource(path_or_repo=BUILTIN)
    request = DeploymentRequest(options, local_hostfile(2), source, draft_head=head)
    with (
        deploy(*open_source(request), DeploymentListener()) as deployment,
        engine_on(deployment, draft_mode=DraftMode.MODEL) as engine,
    ):
        yield engine


@pytest.mark.slow
@pytest.mark.timeout(900 if IS_LONG else 120)
def test_the_program_accepts_as_many_drafts_as_the_training_code_predicts(rows: list[Row], engine: Engine) -> None:
    for row in [row for row in rows if row.temperature == 0][: 200 if IS_LONG else 6]:
        prompt = tuple(row.tokens[: row.num_prompt].tolist())
        num_answer = len(row.tokens) - row.num_prompt
        # One token more than the answer has: the stop token ends it.
        request = Request(prompt, num_answer + 1, Sampling(seed=0, temperature=0.0), frozenset({STOP_ID}))
        *_, end = engine.submit(request).events()
        assert isinstance(end, Finished)
        expected = sum(position.is_head_right for position in drafted_positions([row]))
        assert end.summary.accepted == pytest.approx(expected, abs=1)  # rounding may change one draft
