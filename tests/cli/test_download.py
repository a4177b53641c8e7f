"""Tests of `mlx-k2 download`, then `mlx-k2 generate` from the cache, with a loopback server instead of the Hub."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from tests.advice import follows_advice
from tests.weights.hub_server import Hub, serve_hub

REPO = "moonshotai/Kimi-K2-Tiny"
COMMAND = (str(Path(sys.executable).with_name("mlx-k2")),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with all files of a checkpoint, as in a repository on the Hub."""
    folder = tmp_path_factory.mktemp("repository") / "model"
    vocabulary = tiny_vocabulary(768, 4096)
    write_random_checkpoint(folder, tiny_config_fields(768, max_position_embeddings=4096), 0, vocabulary.files)
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    with serve_hub(REPO, folder) as hub:
        yield hub


def run(hub: Hub, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1,localhost", **environment}
    command = [*COMMAND, *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=100)


@follows_advice(
    "a: connect this host, or run `mlx-k2 download --model owner/name` while it is connected",
)
@pytest.mark.slow
def test_generate_runs_offline_with_the_files_that_download_fetched(hub: Hub, folder: Path, tmp_path: Path) -> None:
    downloaded = run(hub, tmp_path, "download", "--stages", "2", "--model", REPO)
    assert downloaded.returncode == 0, downloaded.stderr
    assert {name for name in hub.fetched if name.endswith(".safetensors")} == {
        path.name for path in folder.glob("*.safetensors")
    }
    hub.requests.clear()
    options = ("--token-ids", "5,6,7", "--max-tokens", "12", "--temperature", "0", "--json")
    cached = run(hub, tmp_path, "generate", "--stages", "2", "--model", REPO, *options, HF_HUB_OFFLINE="1")
    assert cached.returncode == 0, cached.stderr
    assert hub.requests == []
    local = run(hub, tmp_path, "generate", "--stages", "1", "--model", str(folder), *options)
    tokens = [line for line in local.stdout.splitlines() if '"token"' in line]
    assert [line for line in cached.stdout.splitlines() if '"token"' in line] == tokens
    assert len(tokens) == 12


@pytest.mark.slow
def test_a_second_download_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "download", "--model", REPO).returncode == 0
    hub.requests.clear()
    again = run(hub, tmp_path, "download", "--model", REPO)
    assert again.returncode == 0, again.stderr
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_a_dry_run_fetches_the_small_files_only(hub: Hub, tmp_path: Path) -> None:
    shown = run(hub, tmp_path, "generate", "--dry-run", "--stages", "2", "--model", REPO)
    assert shown.returncode == 0, shown.stderr
    assert "model-{00001..0000" in shown.stderr
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


@pytest.mark.slow
def test_a_corrupted_download_is_refused_by_file_name(hub: Hub, folder: Path, tmp_path: Path) -> None:
    name = "model-00003-of-000008.safetensors"
    hub.wrong_contents[name] = bytes(len(hub.files[name]))
    refused = run(hub, tmp_path, "download", "--stages", "2", "--model", REPO)
    assert refused.returncode == 1
    assert refused.stderr.strip().splitlines()[-1].startswith("error: stage 0 on this machine: " + name)
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("model", [(), ("--model", "no-such-owner/no-such-model"), ("--model", "/no/such/folder")])
def test_a_missing_or_unknown_repository_is_refused_before_any_stage_starts(
    hub: Hub, tmp_path: Path, model: tuple[str, ...]
) -> None:
    refused = run(hub, tmp_path, "download", *model)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert refused.stderr.startswith("error: ")


@pytest.mark.slow
def test_a_host_with_a_folder_of_its_own_downloads_nothing_and_the_other_its_files(
    hub: Hub, folder: Path, tmp_path: Path
) -> None:
    here = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([here | {"model": str(folder)}, here]))
    downloaded = run(hub, tmp_path, "download", "--hostfile", str(hostfile), "--split", "3,4", "--model", REPO)
    assert downloaded.returncode == 0, downloaded.stderr
    assert str(folder) in downloaded.stderr
    fetched = {name for name in hub.fetched if name.endswith(".safetensors")}
    assert fetched and fetched < {path.name for path in folder.glob("*.safetensors")}
