"""What the readers of tokenizer files agree on: a vocabulary. Knows no file formats."""

from collections.abc import Callable, Mapping

import msgspec

from mlx_k2.errors import TokenizerError


class Vocabulary(msgspec.Struct, frozen=True):
    """The tokens that one set of files names, and how ordinary text is cut into them.

    ``encode_ordinary`` takes well-formed text and yields ids of ``ordinary`` alone, whatever the text contains.
    """

    encode_ordinary: Callable[[str], list[int]]
    ordinary: Mapping[int, bytes]
    """The bytes that each ordinary token stands for."""
    special: dict[str, int]
    """The control tokens by name."""


class _AddedToken(msgspec.Struct, frozen=True):
    content: str


class _TokenizerConfig(msgspec.Struct, frozen=True):
    added_tokens_decoder: dict[int, _AddedToken] = {}


def named_tokens(tokenizer_config: bytes) -> dict[str, int]:
    """The control tokens that tokenizer_config.json names in added_tokens_decoder.

    Raises:
        TokenizerError: the file is not what it should be, or gives two tokens one name.
    """
    try:
        config = msgspec.json.decode(tokenizer_config, type=_TokenizerConfig)
    except (msgspec.DecodeError, ValueError) as error:
        raise TokenizerError(f"tokenizer_config.json: {error}") from None
    return unique_names([(token.content, number) for number, token in config.added_tokens_decoder.items()])


def unique_names(tokens: list[tuple[str, int]]) -> dict[str, int]:
    """The (name, id) pairs as a mapping.

    Raises:
        TokenizerError: a name is empty or stands for two ids.
    """
    names: dict[str, int] = {}
    for name, token_id in tokens:
        if not name:
            raise TokenizerError(f"special token {token_id} has an empty name")
        if names.setdefault(name, token_id) != token_id:
            raise TokenizerError(f"special token {name!r} has two ids, {names[name]} and {token_id}")
    return names
