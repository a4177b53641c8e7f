"""The manifest of a model's folder: size, checksum and sampled blocks of each weight file. Loads no tensor.

Loading uses it to find a file of another revision, or a damaged copy, without reading the whole file. It is in the
folder, so that a copy of the folder has it.
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
    """Size and SHA-256 of a file; None if the Hub lists no checksum, as for small files."""

    size: int
    sha256: str | None


class FileEntry(msgspec.Struct, frozen=True):
    """One file: size, SHA-256, and a digest of blocks spread over it; None if it was not on this host."""

    size: int
    sha256: str
    blocks: str | None = None


class Manifest(msgspec.Struct, frozen=True):
    """The files of one folder by name."""

    files: dict[str, FileEntry] = {}


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of ``folder``, without files if there is none.

    Raises:
        CheckpointError: it cannot be read.
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
        doctor = f"mlx-k2 doctor --deep --model {shlex.quote(str(folder))}"
        raise CheckpointError(f"{path} is not a manifest: {error}; remove it; `{doctor}` writes another") from None


def write_manifest(folder: Path, files: Mapping[str, HubFile]) -> None:
    """Add ``files`` to the manifest of ``folder``. Do nothing in a folder that this user may not write.

    A file of the model that is not on this host gets an entry without blocks: another host may have it.

    Raises:
        CheckpointError: the folder's manifest cannot be read.
    """
    entries = read_manifest(folder).files
    added = {
        name: FileEntry(file.size, file.sha256, sampled_digest(folder / name) if (folder / name).exists() else None)
        for name, file in files.items()
        if file.sha256 is not None
        and (name not in entries or entries[name].sha256 != file.sha256 or entries[name].blocks is None)
    }
    if added.items() <= entries.items():
        return
    data = msgspec.json.format(msgspec.json.encode(Manifest(dict(sorted((entries | added).items())))), indent=1)
    with contextlib.suppress(OSError):
        write_atomically(folder / MANIFEST_NAME, data + b"\n", 0o644)


def sampled_digest(path: Path) -> str:
    """Return a digest of NUM_BLOCKS blocks of a file, the first and the last among them."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        last = max(0, os.fstat(file.fileno()).st_size - BLOCK_BYTES)
        for number in range(NUM_BLOCKS):
            file.seek(last * number // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def identify(paths: Iterable[Path]) -> dict[str, str | None]:
    """Return the SHA-256 that each file should have by its name, None if this host has no record of it.

    Files that only a manifest names are included: together they identify the folder's revision of the model.

    Raises:
        CheckpointError: a file is not the one that the manifest of its folder describes.
    """
    paths = sorted(paths)
    entries = {folder: read_manifest(folder).files for folder in {path.parent for path in paths}}
    found: dict[str, str | None] = {name: entry.sha256 for files in entries.values() for name, entry in files.items()}
    for path in paths:
        entry = entries[path.parent].get(path.name)
        if entry is None:
            found[path.name] = hub_checksum(path)
        else:
            _compare(path, entry)
    return found


def _compare(path: Path, entry: FileEntry) -> None:
    size = path.stat().st_size
    if size != entry.size:
        problem = f"has {size} bytes, and {MANIFEST_NAME} lists {entry.size}"
    elif entry.blocks is not None and sampled_digest(path) != entry.blocks:
        problem = f"is not the file that {MANIFEST_NAME} describes: a damaged copy, or another revision"
    else:
        return
    raise CheckpointError(f"{path} {problem}: fetch it again; if it is right, remove the manifest")


def hub_checksum(path: Path) -> str | None:
    """Return the SHA-256 that the Hub supplied with the file, or None.

    It is the file's name in the Hub's cache, or is in the metadata file of a plain download.
    """
    metadata = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    words = metadata.read_text(errors="replace").split() if metadata.is_file() else []
    names = (path.resolve().name, *words[1:2])
    return next((name for name in names if _SHA256.fullmatch(name)), None)
