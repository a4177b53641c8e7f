"""Tests of the manifest of a model's folder: files that differ from it are refused while loading."""

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

FILE_BYTES = 500_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of two files with random contents."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(os.urandom(FILE_BYTES))
    return folder


def files_of(folder: Path) -> dict[str, HubFile]:
    """Return size and checksum of each file, as the Hub lists them."""
    return {
        path.name: HubFile(path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.glob("*.safetensors")
    }


def test_files_of_a_folder_without_a_manifest_have_no_checksum(folder: Path) -> None:
    assert identify(folder.glob("*.safetensors")) == {"a.safetensors": None, "b.safetensors": None}


def test_files_in_a_copy_of_the_folder_have_the_checksums_of_its_manifest(folder: Path, tmp_path: Path) -> None:
    files = files_of(folder)
    write_manifest(folder, files)
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert identify(copy.glob("*.safetensors")) == {name: file.sha256 for name, file in files.items()}


@pytest.mark.parametrize("offset", [0, FILE_BYTES - BLOCK_BYTES, FILE_BYTES - 1])
def test_a_changed_byte_in_a_sampled_block_is_refused(folder: Path, offset: int) -> None:
    write_manifest(folder, files_of(folder))
    data = bytearray((folder / "a.safetensors").read_bytes())
    data[offset] ^= 1
    (folder / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"a.safetensors is not the file that {MANIFEST_NAME} describes"):
        identify([folder / "a.safetensors"])
    assert identify([folder / "b.safetensors"])


def test_a_file_with_other_contents_and_one_of_another_size_are_refused(folder: Path) -> None:
    write_manifest(folder, files_of(folder))
    (folder / "a.safetensors").write_bytes(os.urandom(FILE_BYTES))
    (folder / "b.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is not the file"):
        identify([folder / "a.safetensors"])
    with pytest.raises(
        CheckpointError, match=rf"b\.safetensors has 5 bytes, and .* lists {FILE_BYTES}: fetch it again"
    ):
        identify([folder / "b.safetensors"])


def test_a_file_that_is_not_there_yet_is_listed_and_its_blocks_are_added_later(folder: Path) -> None:
    files = files_of(folder)
    (folder / "b.safetensors").rename(folder / "other-name")
    write_manifest(folder, files)
    assert identify([folder / "a.safetensors"]) == {name: file.sha256 for name, file in files.items()}
    assert read_manifest(folder).files["b.safetensors"].blocks is None
    (folder / "other-name").rename(folder / "b.safetensors")
    write_manifest(folder, files)
    assert read_manifest(folder).files["b.safetensors"].blocks == sampled_digest(folder / "b.safetensors")


def test_a_manifest_that_cannot_be_read_is_an_error_of_identify_and_of_write_manifest(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text("{")
    with pytest.raises(
        CheckpointError, match=r"is not a manifest: .*remove it; `mlx-k2 doctor --deep --model .*` writes"
    ):
        identify([folder / "a.safetensors"])
    (folder / MANIFEST_NAME).unlink()
    (folder / MANIFEST_NAME).mkdir()
    with pytest.raises(CheckpointError, match="cannot read"):
        write_manifest(folder, files_of(folder))


def test_the_sampled_digests_of_kimi_k2_read_less_than_10_mb_and_need_less_than_1_s(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10_000_000_000)
    num_files = 62
    started_at = time.process_time()
    for _ in range(num_files):
        sampled_digest(tmp_path / "large")
    assert time.process_time() - started_at < 1.0
    assert NUM_BLOCKS * BLOCK_BYTES * num_files < 10_000_000
