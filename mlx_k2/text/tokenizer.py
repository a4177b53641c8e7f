"""Conversion of text to token ids and of ids to bytes. Knows file contents by name; no paths, messages or templates."""

import functools
import re
from collections.abc import Iterator, Mapping

from mlx_k2.errors import TokenizerError
from mlx_k2.text.tiktoken_model import Vocabulary, read_tiktoken

_STOP_NAMES = ("<|im_end|>", "[EOS]")

# Kimi's own tokenizer cuts text at these lengths before it searches for pieces: the search would otherwise take
# quadratic time in a run of a million spaces. Other lengths would give other tokens.
_MAX_CHUNK = 400_000
_MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")

# tiktoken holds Python's lock while it makes its list of ids, so a long text is encoded in slices. No piece of the
# vocabulary's pattern crosses these places: the start of a line, and the space between two words.
_SLICE_END = re.compile(r"(?<=[\r\n])(?=\S)|(?<=[a-z])(?= [a-z])")


class Tokenizer:
    """A tokenizer with ``vocab_size`` ids: ordinary tokens, and control tokens that no text encodes to."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._encode_ordinary = vocabulary.encode_ordinary
        self._bytes = dict(vocabulary.ordinary)
        for name, number in vocabulary.special.items():
            if not 0 <= number < vocab_size:
                raise TokenizerError(f"special token {name!r} has id {number}, outside the {vocab_size} tokens")
            if number in self._bytes:
                raise TokenizerError(f"special token {name!r} has id {number}, which an ordinary token has")
        names = {number: f"<|reserved_token_{number}|>" for number in range(vocab_size) if number not in self._bytes}
        names |= {number: name for name, number in vocabulary.special.items()}
        self._bytes |= {number: name.encode() for number, name in names.items()}
        self._special_numbers = names.keys()
        self.special_ids: Mapping[str, int] = {name: number for number, name in names.items()} | vocabulary.special
        """The control tokens' ids by name. Ids without a name get ``<|reserved_token_ID|>``, as in Kimi's tokenizer."""
        self.stop_ids = frozenset(self.special_ids[name] for name in _STOP_NAMES if name in self.special_ids)
        """The control tokens that end an answer in every model of the family, independent of its config."""

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of ``text``, ordinary ones only: the name of a control token is encoded as text.

        Lone surrogates, which UTF-8 cannot encode, become U+FFFD.
        """
        ids: list[int] = []
        for part in bounded_parts(well_formed(text)):
            for piece in slices(part):
                ids += self._encode_ordinary(piece)
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
        """Return the bytes of a token, which may be part of a character; those of a control token spell its name."""
        return self._bytes[token_id]

    @functools.cached_property
    def special_names(self) -> re.Pattern[str]:
        """A pattern for the control tokens' names. Where two names match, it matches the longer one."""
        names = sorted(self.special_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def is_special(self, token_id: int) -> bool:
        """Return whether ``token_id`` is a control token."""
        return token_id in self._special_numbers


def load_tokenizer(files: Mapping[str, bytes], vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a checkpoint from its files by name; ``vocab_size`` is the model's.

    Raises:
        TokenizerError: a file is missing or malformed; names the file, and the line that is wrong.
    """
    for name in ("tiktoken.model", "tokenizer_config.json"):
        if name not in files:
            raise TokenizerError(f"the model has no {name}: fetch the tokenizer files of the original checkpoint")
    vocabulary = read_tiktoken(files["tiktoken.model"], files["tokenizer_config.json"], vocab_size)
    return Tokenizer(vocabulary, vocab_size)


def slices(text: str, shortest: int = 16_384) -> Iterator[str]:
    """Yield ``text`` in slices of at least ``shortest`` > 0 characters whose ids, joined, are those of the whole."""
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
    for start in range(0, len(text), _MAX_CHUNK):
        chunk = text[start : start + _MAX_CHUNK]
        cuts = [cut for run in _RUNS.finditer(chunk) for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)]
        yield from (chunk[first:end] for first, end in zip([0, *cuts], [*cuts, len(chunk)], strict=True))
