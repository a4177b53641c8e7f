"""Tests of the manifest of a model's folder: damaged copies and other revisions are found while loading."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import pytest

from mlx_k2.errors import CheckpointError
from mlx_k2.weights.manifest import (
    BLOCK_BYTES,
    MANIFEST_NAME,
    NUM_BLOCKS,
    HubFile,
    identify,
    read_manifest,
    sampled_digest,
    write_manifest,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(os.urandom(500_000))
    return folder


def files_of(folder: Path) -> dict[str, HubFile]:
    return {
        path.name: HubFile(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.glob("*.safetensors")
    }


def test_files_of_a_folder_without_a_manifest_are_compared_with_nothing(folder: Path) -> None:
    assert identify(folder.glob("*.safetensors")) == {"a.safetensors": None, "b.safetensors": None}


def test_files_are_identified_by_the_manifest_that_a_copy_of_the_folder_has_too(folder: Path, tmp_path: Path) -> None:
    files = files_of(folder)
    write_manifest(folder, files)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert identify(copy.glob("*.safetensors")) == {name: file.sha256 for name, file in files.items()}


@pytest.mark.parametrize("offset", [0, 499_999, 500_000 - BLOCK_BYTES])
def test_a_changed_byte_in_a_sampled_block_is_found(folder: Path, offset: int) -> None:
    write_manifest(folder, files_of(folder))
    data = bytearray((folder / "a.safetensors").read_bytes())
    data[offset] ^= 1
    (folder / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"a.safetensors is not the file that {MANIFEST_NAME} describes"):
        identify([folder / "a.safetensors"])
    assert identify([folder / "b.safetensors"])


def test_other_contents_of_the_same_size_and_another_size_are_found(folder: Path) -> None:
    write_manifest(folder, files_of(folder))
    (folder / "a.safetensors").write_bytes(os.urandom(500_000))
    (folder / "b.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is not the file"):
        identify([folder / "a.safetensors"])
    with pytest.raises(CheckpointError, match=r"b\.safetensors has 5 bytes, and .* lists 500000: fetch it again"):
        identify([folder / "b.safetensors"])


def test_files_that_only_the_manifest_names_are_reported_and_completed_later(folder: Path) -> None:
    files = files_of(folder)
    (folder / "b.safetensors").rename(folder / "elsewhere")
    write_manifest(folder, files)
    assert identify([folder / "a.safetensors"]) == {name: file.sha256 for name, file in files.items()}
    assert read_manifest(folder).files["b.safetensors"].blocks is None
    (folder / "elsewhere").rename(folder / "b.safetensors")
    write_manifest(folder, files)
    assert read_manifest(folder).files["b.safetensors"].blocks == sampled_digest(folder / "b.safetensors")


def test_a_manifest_that_cannot_be_written_or_read_is_no_silent_success(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST_NAME).write_text("{")
    with pytest.raises(
        CheckpointError, match=r"is not a manifest: .*remove it; `mlx-k2 doctor --deep --model .*` writes"
    ):
        identify([folder / "a.safetensors"])
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()
    with pytest.raises(CheckpointError, match="cannot read"):
        write_manifest(folder, files_of(folder))


def test_sampling_reads_little_of_a_large_file(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10_000_000_000)
    began = time.process_time()
    for _ in range(62):  # the files of Kimi K2
        sampled_digest(tmp_path / "large")
    assert time.process_time() - began < 1.0
    assert NUM_BLOCKS * BLOCK_BYTES * 62 < 10_000_000
