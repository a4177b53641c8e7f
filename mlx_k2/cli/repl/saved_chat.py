"""A conversation as a file: its messages, and the model that they belong to. Knows no session."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from mlx_k2.bounded_read import read_file
from mlx_k2.errors import RequestError
from mlx_k2.json_text.parse import MAX_BYTES, JsonError, parse_json
from mlx_k2.json_text.read import convert
from mlx_k2.private_files import write_private

Messages = list[dict[str, Any]]
"""Messages in OpenAI's format, from this program or another."""


class SavedChat(msgspec.Struct, frozen=True):
    """The content of a file that /save writes. ``digest`` identifies the model; ``model`` is the model's name."""

    model: str
    digest: str
    messages: Messages


def save_chat(path: Path, chat: SavedChat) -> None:
    """Write the file, readable by its owner only, or leave an existing file unchanged.

    Raises:
        RequestError: the file cannot be written.
    """
    _refuse_special(path)
    try:
        write_private(path, msgspec.json.format(msgspec.json.encode(chat), indent=2) + b"\n")
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None


def _refuse_special(path: Path) -> None:
    """Refuse pipes and devices: a read of a device may have no end, and a write would replace it by a file."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise RequestError(f"{path} is not a regular file")


def load_chat(path: Path, digest: str) -> Sequence[Mapping[str, object]]:
    """Return the messages of a file that /save wrote for the same model, or of a file of another program.

    Raises:
        RequestError: the file cannot be read, is not a saved chat, or belongs to another model.
    """
    _refuse_special(path)
    try:
        value = parse_json(read_file(path, MAX_BYTES))
        if isinstance(value, dict) and "digest" not in value and "messages" in value:
            value = value["messages"]  # the format of a line of a training set
        if isinstance(value, list):
            return convert(value, Messages)
        chat = convert(value, SavedChat)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except JsonError as error:
        raise RequestError(f"{path} is not a saved chat: {error}") from None
    if chat.digest != digest:
        raise RequestError(
            f"{path} is a chat with another model: start with --model {shlex.quote(chat.model)}, or keep only the "
            'list under "messages" to go on with this one'
        )
    return chat.messages
