"""The manifest of a model's folder: size, checksum and a digest of sampled blocks of each weight file. Loads no tensor.

When weights are loaded, the manifest shows that a file is of another revision, or damaged, without a read of the whole
file. It is a file in the model's folder, so that it is copied together with the weights.
"""

import contextlib
import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from mlx_k2.errors import CheckpointError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import read_json
from mlx_k2.private_files import write_atomically
from mlx_k2.weights.safetensors_file import open_regular

MANIFEST_NAME = "mlx-k2-manifest.json"
NUM_BLOCKS = 16
BLOCK_BYTES = 4096
_SHA256 = re.compile(r"[0-9a-f]{64}")


class HubFile(NamedTuple):
    """Size in bytes and SHA-256 of a file; ``sha256`` is None if the Hub lists no checksum, as for small files."""

    size: int
    sha256: str | None


class FileEntry(msgspec.Struct, frozen=True):
    """A file's size in bytes, its SHA-256, and its `sampled_digest`; ``blocks`` None: the file was not on this host."""

    size: int
    sha256: str
    blocks: str | None = None


class Manifest(msgspec.Struct, frozen=True):
    """The entries of one folder's files, by name."""

    files: dict[str, FileEntry] = {}


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of ``folder``; if there is none, one without entries.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    path = folder / MANIFEST_NAME
    try:
        with open_regular(path) as file:
            return read_json(file.read(), Manifest)
    except FileNotFoundError:
        return Manifest()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except JsonError as error:
        command = f"mlx-k2 doctor --deep --model {shlex.quote(str(folder))}"
        raise CheckpointError(f"{path} is not a manifest: {error}; remove it; `{command}` writes another") from None


def write_manifest(folder: Path, files: Mapping[str, HubFile]) -> None:
    """Add the ``files`` that have a checksum to the manifest of ``folder``. Ignore a folder that is not writable.

    A file of the model that is not on this host gets an entry without blocks: another host may have it.

    Raises:
        CheckpointError: the folder's manifest cannot be read.
    """
    old_entries = read_manifest(folder).files
    entries = dict(old_entries)
    for name, file in files.items():
        old = old_entries.get(name)
        if file.sha256 is not None and (old is None or old.sha256 != file.sha256 or old.blocks is None):
            path = folder / name
            entries[name] = FileEntry(file.size, file.sha256, sampled_digest(path) if path.exists() else None)
    if entries == old_entries:
        return
    data = msgspec.json.format(msgspec.json.encode(Manifest(dict(sorted(entries.items())))), indent=1)
    with contextlib.suppress(OSError):
        write_atomically(folder / MANIFEST_NAME, data + b"\n", 0o644)


def sampled_digest(path: Path) -> str:
    """Return the SHA-256 of NUM_BLOCKS blocks spread evenly over a file, from its first block to its last."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        last = max(0, os.fstat(file.fileno()).st_size - BLOCK_BYTES)
        for number in range(NUM_BLOCKS):
            file.seek(last * number // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def identify(paths: Iterable[Path]) -> dict[str, str | None]:
    """Return the recorded SHA-256 of each file, by file name; None if this host has no record of the file.

    The other files in the manifests are included: together the checksums identify the folder's revision of the model.

    Raises:
        CheckpointError: a file is not the one that the manifest of its folder describes.
    """
    paths = sorted(paths)
    manifests = {folder: read_manifest(folder).files for folder in {path.parent for path in paths}}
    checksums: dict[str, str | None] = {}
    for entries in manifests.values():
        checksums |= {name: entry.sha256 for name, entry in entries.items()}
    for path in paths:
        entry = manifests[path.parent].get(path.name)
        if entry is None:
            checksums[path.name] = hub_checksum(path)
        else:
            _check_file(path, entry)
    return checksums


def _check_file(path: Path, entry: FileEntry) -> None:
    size = path.stat().st_size
    if size != entry.size:
        problem = f"has {size} bytes, and {MANIFEST_NAME} lists {entry.size}"
    elif entry.blocks is not None and sampled_digest(path) != entry.blocks:
        problem = f"is not the file that {MANIFEST_NAME} describes: a damaged copy, or another revision"
    else:
        return
    raise CheckpointError(f"{path} {problem}: fetch it again; if it is right, remove the manifest")


def hub_checksum(path: Path) -> str | None:
    """Return the SHA-256 that the Hub supplied with the file; None if there is none.

    In the Hub's cache the file is a link to a file that is named by its SHA-256. After `hf download --local-dir` the
    SHA-256 is the second word of a metadata file.
    """
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    words = metadata.read_text(errors="replace").split() if metadata.is_file() else []
    candidates = (path.resolve().name, *words[1:2])
    return next((word for word in candidates if _SHA256.fullmatch(word)), None)
