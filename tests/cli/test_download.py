"""Tests of `mlx-k2 download`, then `mlx-k2 generate` from the cache, with a loopback server instead of the Hub."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from tests.advice import follows_advice
from tests.cli.command import MLX_K2
from tests.weights.hub_server import Hub, serve_hub

REPO = "moonshotai/Kimi-K2-Tiny"


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


def run(hub: Hub, cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `mlx-k2` with a Hub and a folder for the Hub's cache."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1,localhost", **environment}
    command = [MLX_K2, *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=100)


def fetched_weights(hub: Hub) -> set[str]:
    return {name for name in hub.fetched if name.endswith(".safetensors")}


def token_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if '"token"' in line]


@follows_advice(
    "config.json of owner/name is not in this host's cache, and the Hub cannot be asked (offline): connect this host, "
    "or run `mlx-k2 download --model owner/name` while it is connected",
)
@pytest.mark.slow
def test_generate_runs_offline_with_the_files_that_download_fetched(hub: Hub, folder: Path, tmp_path: Path) -> None:
    download = run(hub, tmp_path, "download", "--stages", "2", "--model", REPO)
    assert download.returncode == 0, download.stderr
    assert fetched_weights(hub) == {path.name for path in folder.glob("*.safetensors")}
    hub.requests.clear()
    options = ("--token-ids", "5,6,7", "--max-tokens", "12", "--temperature", "0", "--json")
    cached = run(hub, tmp_path, "generate", "--stages", "2", "--model", REPO, *options, HF_HUB_OFFLINE="1")
    assert cached.returncode == 0, cached.stderr
    assert hub.requests == []
    local = run(hub, tmp_path, "generate", "--stages", "1", "--model", str(folder), *options)
    assert token_lines(cached.stdout) == token_lines(local.stdout)
    assert len(token_lines(local.stdout)) == 12


@pytest.mark.slow
def test_a_second_download_fetches_no_weights(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, "download", "--model", REPO).returncode == 0
    hub.requests.clear()
    second = run(hub, tmp_path, "download", "--model", REPO)
    assert second.returncode == 0, second.stderr
    assert fetched_weights(hub) == set()


def test_a_dry_run_fetches_the_small_files_only(hub: Hub, tmp_path: Path) -> None:
    dry_run = run(hub, tmp_path, "generate", "--dry-run", "--stages", "2", "--model", REPO)
    assert dry_run.returncode == 0, dry_run.stderr
    assert re.search(r"opens model-\{00001\.\.\d{5}\}-of-000008", dry_run.stderr)
    assert fetched_weights(hub) == set()


@pytest.mark.slow
def test_the_error_about_a_corrupted_download_names_the_file(hub: Hub, folder: Path, tmp_path: Path) -> None:
    name = "model-00003-of-000008.safetensors"
    hub.wrong_contents[name] = bytes(len(hub.files[name]))
    result = run(hub, tmp_path, "download", "--stages", "2", "--model", REPO)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("error: stage 0 on this machine: " + name)
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("model", [(), ("--model", "no-such-owner/no-such-model"), ("--model", "/no/such/folder")])
def test_a_download_without_a_usable_repository_is_refused_in_one_line(
    hub: Hub, tmp_path: Path, model: tuple[str, ...]
) -> None:
    result = run(hub, tmp_path, "download", *model)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ")


@pytest.mark.slow
def test_only_the_host_without_a_model_folder_downloads_its_files(hub: Hub, folder: Path, tmp_path: Path) -> None:
    host = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([host | {"model": str(folder)}, host]))
    download = run(hub, tmp_path, "download", "--hostfile", str(hostfile), "--split", "3,4", "--model", REPO)
    assert download.returncode == 0, download.stderr
    assert str(folder) in download.stderr
    assert set() < fetched_weights(hub) < {path.name for path in folder.glob("*.safetensors")}
