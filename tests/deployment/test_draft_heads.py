"""Tests of a draft head on real stages whose hosts have different files of it."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from mlx_k2.cluster.hostfile import Host
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.deployment.cluster_options import open_source
from mlx_k2.deployment.deploy import deploy
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.errors import MlxK2Error
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import Request
from mlx_k2.testing.random_draft_head import draft_config_fields, write_random_draft_head
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.weights.model_source import DraftHead, ModelSource
from tests.advice import follows_advice
from tests.local_cluster import VOCAB_SIZE, LoadedNames, local_host, local_request, rest_of, write_model
from tests.model.checkpoints import read_config
from tests.weights.hub_server import COMMIT, serve_hub

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "model")


def host_with_home(folder: Path, **environment: str) -> Host:
    """Return this machine as a host with the home ``folder`` and the other variables of ``environment``."""
    folder.mkdir(exist_ok=True)
    script = folder / "python"
    variables = " ".join(f"{name}={value}" for name, value in {"HOME": str(folder), **environment}.items())
    script.write_text(f'#!/bin/sh\n{variables} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return msgspec.structs.replace(local_host(), python=str(script))


def write_head(home: Path, model: Path, seed: int) -> None:
    home.mkdir(exist_ok=True)
    fields = draft_config_fields(tiny_config_fields(VOCAB_SIZE))
    write_random_draft_head(home / "head", fields, read_config(model), seed, own_tensors=())


@pytest.mark.slow
def test_a_stage_whose_layers_the_head_does_not_read_starts_without_the_files_of_the_head(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_head(tmp_path / "first", model, 1)
    monkeypatch.setenv("HOME", str(tmp_path / "first"))
    hosts = [host_with_home(tmp_path / name) for name in ("first", "without", "first")]
    head = DraftHead(source=ModelSource(path_or_repo="~/head"))
    request = replace(local_request(model, hosts), draft_head=head)
    request = request.with_options(split=(4, 1, 2))  # the head reads layers 1 to 3, and the last stage drafts
    with (
        deploy(*open_source(request), DeploymentListener()) as deployment,
        engine_on(deployment, draft_mode=DraftMode.MODEL) as engine,
    ):
        _, end = rest_of(engine.submit(Request((1, 2, 3), 8, Sampling(seed=1), frozenset())))
    assert end.summary.drafted > 0


@pytest.mark.slow
def test_all_hosts_load_the_head_at_one_commit_from_a_hub_that_this_machine_cannot_reach(
    model: Path, tmp_path: Path
) -> None:
    write_head(tmp_path / "hub", model, 1)
    with serve_hub("someone/head", tmp_path / "hub" / "head") as hub:
        hosts = [
            host_with_home(tmp_path / name, HF_ENDPOINT=hub.endpoint, NO_PROXY="127.0.0.1,localhost")
            for name in ("first", "second")
        ]
        head = DraftHead(source=ModelSource(path_or_repo="someone/head"))
        request = replace(local_request(model, hosts), draft_head=head)
        with deploy(request, None, DeploymentListener()) as deployment:
            deployed_head = deployment.request.draft_head
    assert deployed_head is not None
    assert deployed_head.source.revision == COMMIT
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == {"model.safetensors"}


@follows_advice(
    "the draft head on a (stage 0) is not the one on b (stage 1): copy the same files to both",
)
@pytest.mark.parametrize(
    ("second_seed", "problem"),
    [
        (None, r"stage 1 .*--draft-model: .*/head does not exist"),
        pytest.param(
            2,
            r"the draft head on .* \(stage 0\) is not the one on .* \(stage 1\): copy the same files to both",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_head_that_a_host_lacks_or_has_differently_is_refused_before_anything_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second_seed: int | None, problem: str
) -> None:
    write_head(tmp_path / "first", model, 1)
    if second_seed is not None:
        write_head(tmp_path / "second", model, second_seed)
    monkeypatch.setenv("HOME", str(tmp_path / "first"))
    hosts = [host_with_home(tmp_path / name) for name in ("first", "second")]
    head = DraftHead(source=ModelSource(path_or_repo="~/head"))
    request, description = open_source(replace(local_request(model, hosts), draft_head=head))
    loaded = LoadedNames()
    with pytest.raises(MlxK2Error, match=problem) as refused, deploy(request, description, loaded):
        pass
    assert "\n" not in str(refused.value)
    assert not loaded.by_rank
    if second_seed is not None:
        shutil.copytree(tmp_path / "first" / "head", tmp_path / "second" / "head", dirs_exist_ok=True)
        with deploy(request, description, loaded):
            assert sorted(loaded.by_rank) == [0, 1]
