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
    """The location of a checkpoint: BUILTIN, BUILTIN_HEAD, a folder on the host that reads it, or a Hub repository."""

    path_or_repo: str
    revision: str | None = None  # branch, tag or commit of a repository; None: the main branch


class DraftHead(msgspec.Struct, frozen=True, kw_only=True):
    """A draft head and its loading options, as every host gets them.

    ``aux_layers`` are the target's layers, from 0, whose outputs the head reads; None: those of its config.json. Its
    matrices are quantized to ``bits`` bits per weight; None: they are not quantized. It proposes at most ``vocab_size``
    different tokens; None: all tokens of its output projection.
    """

    source: ModelSource
    aux_layers: tuple[int, ...] | None = None
    bits: int | None = None
    vocab_size: int | None = None


def is_repo(source: ModelSource) -> bool:
    """Return whether ``source`` is a Hub repository: it has the form ``owner/name``, and no such path exists here."""
    return bool(_REPO.fullmatch(source.path_or_repo)) and not os.path.lexists(source.path_or_repo)


def model_folder(source: ModelSource) -> Path:
    """Return the folder of a model that is not a repository."""
    if source.path_or_repo == BUILTIN:
        return BUILTIN_FOLDER
    if source.path_or_repo == BUILTIN_HEAD:
        return BUILTIN_HEAD_FOLDER
    return Path(os.path.expanduser(source.path_or_repo))  # noqa: PTH111  # Path.expanduser raises for an unknown user
