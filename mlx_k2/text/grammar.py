"""Grammars over tokens, compiled with llguidance: which tokens may follow those so far. Knows no phases of a reply.

A grammar has ordinary tokens only. Where it may end, the caller decides which control tokens end it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from mlx_k2.errors import RequestError, RequestFailed
from mlx_k2.json_text.parse import parse_json
from mlx_k2.text.schema_check import check_schema
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.token_mask import MaskForm, TokenMask

MAX_GRAMMAR_BYTES = 256 * 1024
"""The largest schema, regular expression or Lark grammar."""
_NUM_CACHED = 256
"""Compiled grammars that are kept. Agents declare the same tools in each request."""
_COMPACT = {"whitespace_flexible": False}
_SPACED = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""K2 writes arguments with or without a space after a separator."""
_MAX_PROBLEM = 300
_LATEST = "http://json-schema.org/schema#"
"""A name of the latest draft, which the compiler does not know, and assumes without one."""
_LENIENT = {"lenient": True, "coerce_one_of": True}
_ANY_OBJECT = {"type": "object"}
_NOT_KNOWN = (
    "Unimplemented keys",
    "not supported",
    "Unknown format",
    "Failed to generate",
    "not disjoint",
    "only supported when",
    "unrecognized escape sequence",
    "repetition operator missing",
    "unclosed character class",
)
"""Parts of the compiler's messages about a correct schema that it cannot compile."""


def _limits() -> LLParserLimits:
    """Return the limits of one grammar. A step of these sizes takes about 10 ms, a usual one below 0.1 ms."""
    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


@dataclass(frozen=True)
class Allowed:
    """The tokens that may follow: a bit for each ordinary token, and whether the text may end here."""

    words: NDArray[np.int32]
    num_tokens: int
    may_end: bool

    def mask(self, ends: Sequence[int], vocab_size: int) -> TokenMask:
        """Return the mask that allows these tokens, and ``ends`` as well."""
        words = self.words
        if ends:
            words = words.copy()
            bits = words.view(np.uint8)
            for token_id in ends:
                bits[token_id // 8] |= 1 << token_id % 8
        if 4 * (self.num_tokens + len(ends)) < vocab_size // 8:
            return TokenMask(MaskForm.ONLY, _ids(words).tobytes())
        return TokenMask(MaskForm.BITS, words.tobytes()[: -(-vocab_size // 8)])

    @property
    def token_ids(self) -> NDArray[np.uint32]:
        """The tokens that may follow."""
        return _ids(self.words)


def _ids(words: NDArray[np.int32]) -> NDArray[np.uint32]:
    """Return the numbers of the bits that are set."""
    used = np.flatnonzero(words)
    bits = np.unpackbits(words[used].view(np.uint8), bitorder="little").reshape(-1, 32)
    word, bit = np.nonzero(bits)
    return (used[word] * 32 + bit).astype(np.uint32)


class GrammarState:
    """A grammar and the tokens that it has accepted so far. It belongs to one reply.

    Its methods raise RequestFailed when the grammar is too complex to continue.
    """

    def __init__(self, matcher: LLMatcher, ordinary: NDArray[np.int32]) -> None:
        self._matcher = matcher
        self._ordinary = ordinary

    def copy(self) -> "GrammarState":
        """Return a state that is independent of this one."""
        return GrammarState(self._matcher.deep_copy(), self._ordinary)

    def accept(self, token_id: int) -> None:
        """Record the next token."""
        self._matcher.consume_token(token_id)
        self._check()

    def allowed(self, draft_ids: Sequence[int] = ()) -> Allowed:
        """Return the tokens that may follow the accepted ones and ``draft_ids``, which the grammar allows."""
        for token_id in draft_ids:
            self._matcher.consume_token(token_id)
        words = np.zeros((1, len(self._ordinary)), np.int32)
        fill_next_token_bitmask(self._matcher, words)
        may_end = self._matcher.is_accepting()
        self._check()
        if draft_ids:
            self._matcher.rollback(len(draft_ids))
        words[0] &= self._ordinary
        num_tokens = int(np.bitwise_count(words.view(np.uint32)).sum())
        if not num_tokens and not may_end:
            raise RequestFailed("request ended: its grammar allows no token here")
        return Allowed(words[0], num_tokens, may_end)

    def forced(self) -> list[int]:
        """Return the tokens that must follow, as the tokenizer writes their text; [] if there is a choice."""
        forced = self._matcher.compute_ff_tokens()
        self._check()
        return forced if all(self._ordinary[number // 32] >> number % 32 & 1 for number in forced) else []

    def _check(self) -> None:
        if self._matcher.is_error():
            problem = self._matcher.get_error().splitlines()[0]
            raise RequestFailed(f"request ended: its grammar cannot follow the answer: {problem}")


class GrammarCompiler:
    """The compiler of grammars over one vocabulary. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._compiled = lru_cache(_NUM_CACHED)(self._compile)

    @cached_property
    def _tables(self) -> tuple[LLTokenizer, NDArray[np.int32]]:
        """The vocabulary in llguidance's form, and a bit for each ordinary token. Takes 0.5 s for Kimi K2's."""
        tokenizer = self.tokenizer
        special = [number for number in range(tokenizer.vocab_size) if tokenizer.is_special(number)]
        if not special:
            raise RequestError("answers cannot be constrained: the model's vocabulary has no control token")
        bits = np.ones(-(-tokenizer.vocab_size // 32) * 32, np.uint8)
        bits[tokenizer.vocab_size :] = 0
        bits[special] = 0
        tables = LLTokenizer(
            TokenizerWrapper(_Vocabulary(tokenizer, special)),
            n_vocab=tokenizer.vocab_size,
            eos_token=special[0],
        )
        return tables, np.packbits(bits, bitorder="little").view(np.int32)

    def json_schema(
        self,
        schema: object,
        what: str,
        *,
        is_strict: bool = False,
        is_spaced: bool = False,
        is_optional: bool = False,
    ) -> tuple[GrammarState, str | None]:
        """Return the grammar of the JSON values of a schema, and a warning if it allows more than the schema.

        If the compiler does not know a keyword, the keyword is ignored; if it still cannot compile the schema, the
        grammar allows any object. ``is_spaced`` allows a space after each separator. ``what`` names the schema. If
        ``is_optional``, every problem of the compiler counts as a keyword that it does not know.

        Raises:
            RequestError: the schema is malformed, too large, refers to another document or has no finite value; or,
                if ``is_strict``, the compiler does not know a keyword.
        """
        text = _schema_text(schema, what)
        check_schema(schema, what)
        options = _SPACED if is_spaced else _COMPACT
        matcher, problem = self._compiled("schema", text, json.dumps(options))
        if not problem:
            return self._state(matcher), None
        if is_strict or not (is_optional or any(mark in problem for mark in _NOT_KNOWN)):
            raise RequestError(f"{what} cannot be enforced: {problem}")
        matcher, remaining = self._compiled("schema", text, json.dumps(options | _LENIENT))
        if not remaining:
            return self._state(matcher), f"{what}: keywords that cannot be enforced are ignored: {problem}"
        matcher, _ = self._compiled("schema", json.dumps(_ANY_OBJECT), json.dumps(options))
        return self._state(matcher), f"{what} cannot be enforced, and any object is allowed: {problem}"

    def text(self, kind: str, grammar: str) -> GrammarState:
        """Return the grammar of a regular expression (``kind`` "regex") or a Lark grammar ("lark").

        Raises:
            RequestError: it is malformed, too large or too complex, or allows no text.
        """
        what = "the regular expression" if kind == "regex" else "the Lark grammar"
        if len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"{what} is larger than {MAX_GRAMMAR_BYTES} bytes")
        matcher, problem = self._compiled(kind, grammar)
        if problem:
            raise RequestError(f"{what} cannot be compiled: {problem}")
        return self._state(matcher)

    def choice(self, texts: Sequence[str]) -> GrammarState:
        """Return the grammar of one of ``texts``."""
        literals = (json.dumps(text).replace("\x7f", "\\u007f") for text in texts)
        return self.text("lark", "start: " + " | ".join(literals))

    def _state(self, matcher: LLMatcher) -> GrammarState:
        return GrammarState(matcher, self._tables[1]).copy()

    def _compile(self, kind: str, text: str, options: str = "{}") -> tuple[LLMatcher, str]:
        """Return the matcher, at its beginning, and the problem; '' for none."""
        tables, ordinary = self._tables
        match kind:
            case "schema":
                grammar = LLMatcher.grammar_from_json_schema(text, overrides=json.loads(options))
            case "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            case _:
                grammar = LLMatcher.grammar_from_lark(text)
        matcher = LLMatcher(tables, grammar, log_level=0, limits=_limits())
        problem = matcher.get_error()
        if not problem:
            try:
                GrammarState(matcher, ordinary).allowed()
            except RequestFailed:
                problem = "it allows no text, or is too complex"
        return matcher, " ".join(problem.split())[:_MAX_PROBLEM]


class _Vocabulary:
    """A tokenizer in the form that llguidance reads. Control tokens have no bytes, so that no grammar reaches them."""

    def __init__(self, tokenizer: Tokenizer, special: Sequence[int]) -> None:
        self.eos_token_id = special[0]
        self.bos_token_id = None
        self.special_token_ids = special
        self.tokens = [tokenizer.token_bytes(number) for number in range(tokenizer.vocab_size)]
        for number in special[1:]:
            self.tokens[number] = b""
        self._encode = tokenizer.encode_text

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the ids of ordinary tokens."""
        return self._encode(text.decode() if isinstance(text, bytes) else text)


def _schema_text(schema: object, what: str) -> str:
    """Return a schema as JSON, without the compiler's own options.

    Raises:
        RequestError: it is too large, or not JSON.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False)
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"{what} is larger than {MAX_GRAMMAR_BYTES} bytes")
        found = parse_json(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what} is not JSON: {error}") from None
    if isinstance(found, dict) and ("x-guidance" in found or found.get("$schema") == _LATEST):
        left_out = ("x-guidance", "$schema")
        text = json.dumps({key: value for key, value in found.items() if key not in left_out}, ensure_ascii=False)
    return text
