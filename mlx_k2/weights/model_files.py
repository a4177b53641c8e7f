"""The files of a model on this host. Files of a repository are fetched from the Hub if they are missing."""

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from mlx_k2.config import ModelConfig
from mlx_k2.errors import CheckpointError, DownloadError
from mlx_k2.weights.checkpoint import locate_tensors, read_small_files
from mlx_k2.weights.draft_head import DraftDescription, describe_draft
from mlx_k2.weights.hub import FetchedFiles, HubRepo, OnProgress, bytes_to_fetch, fetch_files, fetch_small_files
from mlx_k2.weights.index import CheckpointIndex
from mlx_k2.weights.inventory import TensorSpec
from mlx_k2.weights.manifest import sampled_digest, write_manifest
from mlx_k2.weights.model_source import DraftHead, ModelSource, is_repo, model_folder


class ModelFilesHere(NamedTuple):
    """A model's small files by name, and its source. If it is a repository, its revision is the commit."""

    files: dict[str, bytes]
    source: ModelSource


def read_model_files(source: ModelSource) -> ModelFilesHere:
    """Return the model's config, index and tokenizer files (TOKENIZER_NAMES). Fetch them from a repository.

    A repository without an index has one file of weights: it is fetched, too, because its header replaces the index.

    Raises:
        CheckpointError, DownloadError: a file cannot be read or fetched on this host.
    """
    if not is_repo(source):
        return ModelFilesHere(read_small_files(model_folder(source)), source)
    fetched = fetch_small_files(_hub_repo(source))
    pinned = ModelSource(path_or_repo=source.path_or_repo, revision=fetched.commit)
    return ModelFilesHere(read_small_files(fetched.folder), pinned)


class DraftHere(NamedTuple):
    """A draft head's description and loading options. If its source is a repository, the revision is the commit."""

    draft: DraftDescription
    head: DraftHead


def read_draft(head: DraftHead, target: ModelConfig) -> DraftHere:
    """Return the description of a draft head from its files on this host.

    For a local folder also check the headers of its weight files, and include some blocks of these files in the
    description's digest, so that different copies on two hosts have different digests.

    Raises:
        SetupError: the head is missing, or is for another model than ``target``.
    """
    try:
        files, source = read_model_files(head.source)
        draft = describe_draft(files, head, target)
        if not is_repo(source):
            paths = locate_tensors(model_folder(source), draft.index, draft.specs()).values()
            digests = [draft.digest, *(sampled_digest(path) for path in sorted(set(paths)))]
            draft = dataclasses.replace(draft, digest=hashlib.sha256("".join(digests).encode()).hexdigest())
    except (CheckpointError, DownloadError) as error:
        prefix = "" if str(error).startswith("--draft-model") else "--draft-model: "  # `describe_draft` names it
        raise type(error)(f"{prefix}{error}") from None
    return DraftHere(draft, msgspec.structs.replace(head, source=source))


def locate_shard(
    source: ModelSource, index: CheckpointIndex, specs: Iterable[TensorSpec], on_progress: OnProgress
) -> dict[str, Path]:
    """Return the path of the file of each tensor, by tensor name. Check headers; fetch missing files of a repository.

    Raises:
        CheckpointError, DownloadError: a file is missing, cannot be fetched, or does not match ``specs``.
    """
    specs = tuple(specs)
    folder = fetch_shard(source, index, specs, on_progress).folder if is_repo(source) else model_folder(source)
    return locate_tensors(folder, index, specs)


def files_to_fetch(source: ModelSource, index: CheckpointIndex, specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Return the size in bytes of each file of ``specs`` that is not on this host yet, by name. Fetch none of them.

    Raises:
        CheckpointError, DownloadError: the index does not name a tensor, or the Hub cannot be reached.
    """
    return bytes_to_fetch(_hub_repo(source), index.files(specs)) if is_repo(source) else {}


def fetch_shard(
    source: ModelSource, index: CheckpointIndex, specs: Iterable[TensorSpec], on_progress: OnProgress
) -> FetchedFiles:
    """Fetch the files of a repository that hold ``specs`` and are not on this host yet; add them to its manifest.

    Raises:
        CheckpointError, DownloadError: the index does not name a tensor, or a file cannot be fetched.
    """
    fetched = fetch_files(_hub_repo(source), index.files(specs), on_progress)
    write_manifest(fetched.folder, fetched.hub_files)
    return fetched


def _hub_repo(source: ModelSource) -> HubRepo:
    return HubRepo(source.path_or_repo, source.revision)
