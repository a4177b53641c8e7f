"""Tests of the built-in model's draft head on the model's own answers to held-out questions.

The answers come from the package training, which computes model and head by other code than the program.
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
EVERY = 1 if IS_LONG else 20
"""Step between the 200 held-out prompts that are used."""
STOP_ID = load_encoding(BUILTIN_FOLDER / "tiktoken.model").encode_single_token("<|im_end|>")


def answers(folder: Path, aux_layers: tuple[int, ...]) -> list[Row]:
    """Return the model's answers at both temperatures, with the outputs of ``aux_layers``."""
    path = folder / "answers.safetensors"
    make_file(Target(aux_layers), path, list(held_out_prompts().values())[::EVERY], 0, is_split=False)
    return read_rows([path])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return answers(tmp_path_factory.mktemp("answers"), AUX_LAYERS)


def measured(rows: list[Row]) -> list[Position]:
    return list(positions([("any", row) for row in rows], read_weights(BUILTIN_HEAD_FOLDER)))


def part(found: list[Position], temperature: int, source: str) -> float:
    """Return the part of the positions at a temperature that are drafted right."""
    chosen = [position for position in found if position.temperature == temperature]
    return sum(bool(getattr(position, source)) for position in chosen) / len(chosen)


@pytest.mark.slow
@pytest.mark.timeout(900 if IS_LONG else 120)
def test_the_head_is_right_for_most_positions_and_clearly_more_often_than_ngrams(rows: list[Row]) -> None:
    found = measured(rows)
    for temperature, least in ((0, 0.6), (1, 0.5)):
        assert part(found, temperature, "is_head_right") >= least
        assert part(found, temperature, "is_head_right") >= part(found, temperature, "is_ngram_right") + 0.1


@pytest.mark.slow
@pytest.mark.timeout(900 if IS_LONG else 120)
def test_layers_that_are_off_by_one_lower_the_acceptance(rows: list[Row], tmp_path: Path) -> None:
    shifted = answers(tmp_path, tuple(layer + 1 for layer in AUX_LAYERS))
    right, wrong = (part(measured(some), 0, "is_head_right") for some in (rows, shifted))
    assert wrong <= right - 0.05


def test_the_file_is_small_and_has_the_public_names() -> None:
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
        engine_on(deployment, draft_mode=DraftMode.MODEL) as running,
    ):
        yield running


@pytest.mark.slow
@pytest.mark.timeout(900 if IS_LONG else 120)
def test_the_program_accepts_as_many_drafts_as_the_training_code_predicts(rows: list[Row], engine: Engine) -> None:
    for row in [row for row in rows if row.temperature == 0][: 200 if IS_LONG else 6]:
        prompt, answer = tuple(row.tokens[: row.num_prompt].tolist()), row.tokens[row.num_prompt :].tolist()
        request = Request(prompt, len(answer) + 1, Sampling(seed=0, temperature=0.0), frozenset({STOP_ID}))
        *_, end = engine.submit(request).events()
        assert isinstance(end, Finished)
        expected = sum(position.is_head_right for position in measured([row]))
        assert end.summary.accepted == pytest.approx(expected, abs=1)
