"""Conversion of text to token ids and of ids to bytes, with tiktoken.model, the vocabulary file of the Kimi K2 family.

Knows the contents of files, but no paths; knows no messages and no templates.
"""

import base64
import binascii
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise

import msgspec
import tiktoken

from mlx_k2.errors import TokenizerError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import read_json

FILE, CONFIG_FILE = "tiktoken.model", "tokenizer_config.json"

# The pattern, from Kimi's own tokenizer, of the pieces that are encoded separately: runs of Han characters; words that
# end in lower case, and words that begin in upper case, with an optional leading character and English contraction; up
# to three digits; punctuation; line ends; other space. `&&` is the intersection of character classes in Rust's syntax.
_PIECES = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

# K2-Thinking writes these control tokens, but its tokenizer_config.json may lack them. Later models share its
# vocabulary, which is recognized by its number of ordinary tokens, and name them.
_K2_NUM_RANKS = 163_584
_K2_THINK_TOKENS = {"<think>": 163_606, "</think>": 163_607}

_STOP_NAMES = ("<|im_end|>", "[EOS]")

# Kimi's own tokenizer cuts text at these lengths before it searches for pieces: the search would otherwise take
# quadratic time in a run of a million spaces. Other lengths would give other tokens.
_MAX_CHUNK_CHARS = 400_000
_MAX_RUN_CHARS = 25_000
_SPACE_RUNS = re.compile(r"\s+|\S+")

# tiktoken holds the GIL while it makes its list of ids, so a long text is encoded in slices. A slice ends where no
# piece of _PIECES can continue: at the start of a line, and before the space between two words.
_SLICE_END = re.compile(r"(?<=[\r\n])(?=\S)|(?<=[a-z])(?= [a-z])")


class Tokenizer:
    """A tokenizer with ``vocab_size`` ids: ordinary tokens, and control tokens, which no text is encoded to.

    ``encode_ordinary`` returns ids of ordinary tokens only, for any text without lone surrogates. ``ordinary`` has the
    bytes of each ordinary token by id, ``special`` the ids of the control tokens by name.

    Raises:
        TokenizerError: the id of a control token is outside the vocabulary, or is that of an ordinary token.
    """

    def __init__(
        self,
        encode_ordinary: Callable[[str], list[int]],
        ordinary: Mapping[int, bytes],
        special: Mapping[str, int],
        vocab_size: int,
    ) -> None:
        self.vocab_size = vocab_size
        self._encode_ordinary = encode_ordinary
        self._bytes = dict(ordinary)
        for name, token_id in special.items():
            if not 0 <= token_id < vocab_size:
                raise TokenizerError(f"special token {name!r} has id {token_id}, outside the {vocab_size} tokens")
            if token_id in self._bytes:
                raise TokenizerError(f"special token {name!r} has id {token_id}, which an ordinary token has")
        unused_ids = (token_id for token_id in range(vocab_size) if token_id not in self._bytes)
        names = {token_id: f"<|reserved_token_{token_id}|>" for token_id in unused_ids}
        names |= {token_id: name for name, token_id in special.items()}
        self._bytes |= {token_id: name.encode() for token_id, name in names.items()}
        self._control_ids = names.keys()
        self.special_ids: Mapping[str, int] = {name: token_id for token_id, name in names.items()} | dict(special)
        """The control tokens' ids by name. Unnamed ids are ``<|reserved_token_ID|>``, as in Kimi's tokenizer.

        A name in ``special`` keeps its id, also if it is such a reserved name or if another name has the same id.
        """
        self.stop_ids = frozenset(self.special_ids[name] for name in _STOP_NAMES if name in self.special_ids)
        """The control tokens that end an answer in every model of the family, whatever its config."""

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of ``text``, of ordinary tokens only: the name of a control token is encoded like any text.

        Lone surrogates, which UTF-8 cannot encode, become U+FFFD.
        """
        ids: list[int] = []
        for part in bounded_parts(well_formed(text)):
            for text_slice in slices(part):
                ids += self._encode_ordinary(text_slice)
        return ids

    def token_id(self, name: str) -> int:
        """Return the id of the control token ``name``.

        Raises:
            TokenizerError: there is no such control token.
        """
        try:
            return self.special_ids[name]
        except KeyError:
            raise TokenizerError(f"the tokenizer has no special token {name!r}") from None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token, which may be part of a character; for a control token the bytes of its name."""
        return self._bytes[token_id]

    @functools.cached_property
    def special_names(self) -> re.Pattern[str]:
        """A pattern of the control tokens' names. Where two names match, it matches the longer one."""
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def is_special(self, token_id: int) -> bool:
        """Return whether ``token_id`` is a control token."""
        return token_id in self._control_ids


class _AddedToken(msgspec.Struct, frozen=True):
    content: str


class _TokenizerConfig(msgspec.Struct, frozen=True):
    added_tokens_decoder: dict[int, _AddedToken] = {}


def load_tokenizer(files: Mapping[str, bytes], vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a checkpoint. ``files`` has file contents by name, ``vocab_size`` is the model's.

    Raises:
        TokenizerError: a file is missing or malformed; names the file, the line in tiktoken.model, and the problem.
    """
    for name in (FILE, CONFIG_FILE):
        if name not in files:
            raise TokenizerError(f"the model has no {name}: fetch the tokenizer files of the original checkpoint")
    ranks = _ranks(files[FILE], vocab_size)
    special = _named_tokens(files[CONFIG_FILE])
    if len(ranks) == _K2_NUM_RANKS:
        used = set(special.values())
        missing = {name: token_id for name, token_id in _K2_THINK_TOKENS.items() if token_id not in used}
        special = missing | special
    # tiktoken gets no special tokens, so that it cannot produce one from text.
    encoding = tiktoken.Encoding("kimi-k2", pat_str=_PIECES, mergeable_ranks=ranks, special_tokens={})
    return Tokenizer(encoding.encode_ordinary, {rank: token for token, rank in ranks.items()}, special, vocab_size)


def slices(text: str, shortest: int = 16_384) -> Iterator[str]:
    """Yield ``text`` in slices that are encoded to the same ids as the whole.

    Each slice has at least ``shortest`` > 0 characters; the last one may have fewer.
    """
    start = 0
    while end := _SLICE_END.search(text, start + shortest):
        yield text[start : end.start()]
        start = end.start()
    yield text[start:]


def well_formed(text: str) -> str:
    """Return ``text`` with surrogate pairs joined, and lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def bounded_parts(text: str) -> Iterator[str]:
    """Yield ``text`` in parts of at most 400,000 characters and 25,000 consecutive spaces or non-spaces."""
    for start in range(0, len(text), _MAX_CHUNK_CHARS):
        chunk = text[start : start + _MAX_CHUNK_CHARS]
        cuts = [0]
        for run in _SPACE_RUNS.finditer(chunk):
            cuts += range(run.start() + _MAX_RUN_CHARS, run.end(), _MAX_RUN_CHARS)
        yield from (chunk[begin:end] for begin, end in pairwise([*cuts, len(chunk)]))


def _ranks(model: bytes, vocab_size: int) -> dict[bytes, int]:
    """Return each ordinary token's rank, which is its id, from the contents of tiktoken.model."""
    ranks: dict[bytes, int] = {}
    used_ranks: set[int] = set()
    for number, line in enumerate(model.splitlines(), start=1):
        if not line:
            continue
        token, rank = _token_and_rank(line, number)
        if rank >= vocab_size:
            raise TokenizerError(f"{FILE} line {number}: rank {rank} is outside the vocabulary of {vocab_size} tokens")
        if token in ranks or rank in used_ranks:
            repeated = f"token {token!r}" if token in ranks else f"rank {rank}"
            raise TokenizerError(f"{FILE} line {number}: {repeated} occurs twice")
        ranks[token] = rank
        used_ranks.add(rank)
    if missing := set(range(len(ranks))) - used_ranks:
        raise TokenizerError(f"{FILE}: rank {min(missing)} is missing")
    for byte in range(256):
        if bytes([byte]) not in ranks:
            raise TokenizerError(f"{FILE}: no token for the single byte 0x{byte:02x}, so not every text can be encoded")
    return ranks


def _token_and_rank(line: bytes, number: int) -> tuple[bytes, int]:
    fields = line.split()
    if len(fields) != 2 or not fields[1].isdigit():
        raise TokenizerError(f"{FILE} line {number}: not a base64 token and its rank: {line[:60]!r}")
    try:
        return base64.b64decode(fields[0], validate=True), int(fields[1])
    except binascii.Error:
        raise TokenizerError(f"{FILE} line {number}: {fields[0][:60]!r} is not base64") from None


def _named_tokens(tokenizer_config: bytes) -> dict[str, int]:
    """Return the control tokens that tokenizer_config.json names in added_tokens_decoder.

    Raises:
        TokenizerError: the file is malformed, a name is empty, or a name has two ids.
    """
    try:
        config = read_json(tokenizer_config, _TokenizerConfig)
    except JsonError as error:
        raise TokenizerError(f"{CONFIG_FILE}: {error}") from None
    names: dict[str, int] = {}
    for token_id, token in config.added_tokens_decoder.items():
        if not token.content:
            raise TokenizerError(f"special token {token_id} has an empty name")
        if names.setdefault(token.content, token_id) != token_id:
            raise TokenizerError(f"special token {token.content!r} has two ids, {names[token.content]} and {token_id}")
    return names
