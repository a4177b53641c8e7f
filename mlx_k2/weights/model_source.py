"""The name of a model: the built-in one, a folder, or a repository on the Hub. Reads and fetches no file."""

import os
import re
from pathlib import Path

import msgspec

from mlx_k2.builtin import BUILTIN_FOLDER, BUILTIN_HEAD_FOLDER

BUILTIN = "built-in"
BUILTIN_HEAD = "built-in draft head"
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """The location of a checkpoint: BUILTIN, BUILTIN_HEAD, a folder of the reading host, or a repository on the Hub."""

    path_or_repo: str
    revision: str | None = None


class DraftHead(msgspec.Struct, frozen=True, kw_only=True):
    """A draft head and the options of its loading, which every host gets.

    ``aux_layers`` are the layers, from 0, whose outputs it reads; None: those of its config.json. Its matrices are
    quantized to ``bits`` bits per weight; None: they are not quantized. It proposes at most ``vocab_size`` different
    tokens; None: all that it has.
    """

    source: ModelSource
    aux_layers: tuple[int, ...] | None = None
    bits: int | None = None
    vocab_size: int | None = None


def is_repo(source: ModelSource) -> bool:
    """Return whether ``source`` names a Hub repository: ``owner/name``, and this host has nothing of that name."""
    return bool(_REPO.fullmatch(source.path_or_repo)) and not os.path.lexists(source.path_or_repo)


def model_folder(source: ModelSource) -> Path:
    """Return the folder of a model that is not a repository."""
    if source.path_or_repo in (BUILTIN, BUILTIN_HEAD):
        return BUILTIN_FOLDER if source.path_or_repo == BUILTIN else BUILTIN_HEAD_FOLDER
    return Path(os.path.expanduser(source.path_or_repo))  # noqa: PTH111  # Path.expanduser raises for an unknown user
