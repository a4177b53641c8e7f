"""Where this host finds a model: the built-in one, a folder, or a repository on the Hub. Loads no tensor."""

import re
from collections.abc import Iterable
from pathlib import Path

from mlx_k2.builtin.checkpoint import builtin_folder
from mlx_k2.control.messages import ModelSource
from mlx_k2.weights.checkpoint import locate_tensors, read_small_files
from mlx_k2.weights.index import CheckpointIndex
from mlx_k2.weights.inventory import TensorSpec

BUILTIN = "built-in"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo(source: ModelSource) -> bool:
    """Whether ``source`` names a repository on the Hub: ``owner/name``, and no folder of that name is here."""
    return bool(_REPO.fullmatch(source.path_or_repo)) and not Path(source.path_or_repo).is_dir()


def model_folder(source: ModelSource) -> Path:
    """The folder of a model that is not a repository."""
    return builtin_folder() if source.path_or_repo == BUILTIN else Path(source.path_or_repo).expanduser()


def read_model_files(source: ModelSource) -> dict[str, bytes]:
    """The model's config, index, tokenizer and template by name; of a repository only these are fetched.

    Raises:
        CheckpointError, DownloadError: they cannot be had here.
    """
    return read_small_files(model_folder(source))


def locate_shard(source: ModelSource, index: CheckpointIndex, specs: Iterable[TensorSpec]) -> dict[str, Path]:
    """The file of each tensor of ``specs``, its header checked; files of a repository that are missing are fetched.

    Raises:
        CheckpointError, DownloadError: a file is missing, cannot be fetched, or does not hold what it should.
    """
    return locate_tensors(model_folder(source), index, specs)
