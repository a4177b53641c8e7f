"""A small tokenizer and the built-in model's chat template, which many tests share, and prompts made with them."""

import base64
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from mlx_k2.text.chat_template import ChatTemplate, load_chat_template
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.prompt import PromptPiece, encode_pieces, render_pieces
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 800
FILES = tiny_vocabulary(VOCAB_SIZE, max_position_embeddings=4096).files


@functools.cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(FILES, VOCAB_SIZE)


@functools.cache
def builtin_template() -> ChatTemplate:
    return load_chat_template(FILES)


def pieces_of(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    tools: Any = None,
    **options: Any,
) -> list[PromptPiece]:
    """Return the prompt of messages in OpenAI's format, in pieces. ``options`` are variables of the template."""
    return render_pieces(template, tokenizer, read_history(messages, template.fields).messages, tools, **options)


def ids_of(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, object]],
    tools: Any = None,
    **options: Any,
) -> list[int]:
    """Return the prompt of messages in OpenAI's format, in token ids. ``options`` are variables of the template."""
    return encode_pieces(tokenizer, pieces_of(template, tokenizer, messages, tools, **options))


def as_text(pieces: list[PromptPiece]) -> str:
    """Return the text of a prompt, with the names of its control tokens."""
    return "".join(piece if isinstance(piece, str) else tokenizer().token_bytes(piece).decode() for piece in pieces)


def decode(ids: list[int]) -> str:
    """Return the text of token ids, with the names of control tokens."""
    return b"".join(map(tokenizer().token_bytes, ids)).decode()


SINGLE_BYTES = [bytes([byte]) for byte in range(256)]


def tiktoken_files(tokens: list[bytes], control_tokens: dict[int, str] | None = None) -> dict[str, bytes]:
    """Return the files of a vocabulary: ordinary tokens in the order of their ids, and control tokens by their ids."""
    added_tokens = {str(token_id): {"content": name} for token_id, name in (control_tokens or {}).items()}
    return {
        "tiktoken.model": b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)),
        "tokenizer_config.json": json.dumps({"added_tokens_decoder": added_tokens}).encode(),
    }
