"""Grammars over tokens, compiled with llguidance: which tokens may follow those so far. Knows no phases of a reply.

A grammar has ordinary tokens only. Where it may end, the caller decides which control tokens end it.
"""

import copy
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.numpy import fill_next_token_bitmask
from numpy.typing import NDArray

from mlx_k2.errors import RequestError, RequestFailed
from mlx_k2.json_text.parse import parse_json
from mlx_k2.text.schema_check import check_schema
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.token_mask import MaskForm, TokenMask

_Result = TypeVar("_Result")
MAX_GRAMMAR_BYTES = 256 * 1024
"""The largest schema, regular expression or Lark grammar."""
_NUM_CACHED = 256
"""Compiled grammars that are kept. Agents declare the same tools in each request."""
_COMPACT = {"whitespace_flexible": False}
_SPACED = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""K2 writes arguments with or without a space after a separator."""
_NUM_PROBED = 32
"""Steps that are tried before a grammar is used. One that is too complex usually fails at its first steps."""
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


class _Compiled:
    """A compiled grammar. Its copies share a lexer: a copy that exceeds the lexer's limits ends it for all of them."""

    def __init__(self, make: Callable[[], LLMatcher]) -> None:
        self._make = make
        self.matcher = make()

    def replace(self, ended: LLMatcher) -> LLMatcher:
        """Return a matcher whose lexer is not that of ``ended``."""
        if self.matcher is ended:
            self.matcher = self._make()
        return self.matcher


class GrammarState:
    """A grammar and the tokens that it has accepted so far. It belongs to one reply.

    Its methods raise RequestFailed when the grammar is too complex to continue.
    """

    def __init__(self, compiled: _Compiled, ordinary: NDArray[np.int32]) -> None:
        self._compiled = compiled
        self._ordinary = ordinary
        self._first = compiled.matcher
        self._matcher = self._first.deep_copy()
        self._token_ids: list[int] = []

    def copy(self) -> "GrammarState":
        """Return a state that is independent of this one."""
        new = copy.copy(self)
        new._matcher, new._token_ids = self._matcher.deep_copy(), self._token_ids.copy()
        return new

    def accept(self, token_id: int) -> None:
        """Record the next token."""
        self._run(lambda matcher: matcher.consume_token(token_id))
        self._token_ids.append(token_id)

    def allowed(self, draft_ids: Sequence[int] = ()) -> Allowed:
        """Return the tokens that may follow the accepted ones and ``draft_ids``, which the grammar allows.

        An error that the draft tokens cause does not change this state.
        """
        if draft_ids:
            drafted = self.copy()
            for token_id in draft_ids:
                drafted.accept(token_id)
            return drafted.allowed()
        words = np.zeros((1, len(self._ordinary)), np.int32)
        self._run(lambda matcher: fill_next_token_bitmask(matcher, words))
        may_end = self._run(LLMatcher.is_accepting)
        words[0] &= self._ordinary
        num_tokens = int(np.bitwise_count(words.view(np.uint32)).sum())
        if not num_tokens and not may_end:
            raise RequestFailed("request ended: its grammar allows no token here")
        return Allowed(words[0], num_tokens, may_end)

    def forced(self) -> list[int]:
        """Return the tokens that must follow, as the tokenizer writes their text; [] if there is a choice."""
        forced = self._run(LLMatcher.compute_ff_tokens)
        return forced if all(self._ordinary[number // 32] >> number % 32 & 1 for number in forced) else []

    def _run(self, step: Callable[[LLMatcher], _Result]) -> _Result:
        """Return the result of a step. If the lexer has ended, perhaps in another reply, try again with a new one."""
        result = step(self._matcher)
        if self._matcher.is_error():
            self._begin_again()
            result = step(self._matcher)
        if self._matcher.is_error():
            problem = self._matcher.get_error().splitlines()[0]
            self._compiled.replace(self._first)
            raise RequestFailed(f"request ended: its grammar cannot follow the answer: {problem}")
        return result

    def _begin_again(self) -> None:
        """Accept the same tokens with a new matcher."""
        self._first = self._compiled.replace(self._first)
        self._matcher = self._first.deep_copy()
        for start in range(0, len(self._token_ids), _NUM_PROBED):
            self._matcher.consume_tokens(self._token_ids[start : start + _NUM_PROBED])
            self._matcher.compute_bitmask()  # each mask renews the limit of the lexer's work


class GrammarCompiler:
    """The compiler of grammars over one vocabulary. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._compiled = lru_cache(_NUM_CACHED)(self._compile)
        self._tables = lru_cache(1)(self._read_tables)
        self._lock = threading.Lock()

    def _read_tables(self) -> tuple[LLTokenizer, NDArray[np.int32]]:
        """Return the vocabulary in llguidance's form, and a bit for each ordinary token. Takes 0.5 s for Kimi K2's."""
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
        state, problem = self._begin("schema", text, json.dumps(options))
        if not problem:
            return state, None
        if is_strict or not (is_optional or any(mark in problem for mark in _NOT_KNOWN)):
            raise RequestError(f"{what} cannot be enforced: {problem}")
        state, remaining = self._begin("schema", text, json.dumps(options | _LENIENT))
        if not remaining:
            return state, f"{what}: keywords that cannot be enforced are ignored: {problem}"
        state, _ = self._begin("schema", json.dumps(_ANY_OBJECT), json.dumps(options))
        return state, f"{what} cannot be enforced, and any object is allowed: {problem}"

    def text(self, kind: str, grammar: str) -> GrammarState:
        """Return the grammar of a regular expression (``kind`` "regex") or a Lark grammar ("lark").

        Raises:
            RequestError: it is malformed, too large or too complex, or allows no text.
        """
        what = "the regular expression" if kind == "regex" else "the Lark grammar"
        if len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"{what} is larger than {MAX_GRAMMAR_BYTES} bytes")
        state, problem = self._begin(kind, grammar, "{}")
        if problem:
            raise RequestError(f"{what} cannot be compiled: {problem}")
        return state

    def choice(self, texts: Sequence[str]) -> GrammarState:
        """Return the grammar of one of ``texts``. It is compiled while a reply runs, so its steps are not tried."""
        literals = (json.dumps(text).replace("\x7f", "\\u007f") for text in texts)
        return self.text("choice", "start: " + " | ".join(literals))

    def _begin(self, kind: str, text: str, options: str) -> tuple[GrammarState, str]:
        """Return a grammar at its beginning, and the problem; '' for none."""
        with self._lock:  # else each of several threads would make the tables
            _, ordinary = self._tables()
        compiled, problem = self._compiled(kind, text, options)
        return GrammarState(compiled, ordinary), problem

    def _compile(self, kind: str, text: str, options: str) -> tuple[_Compiled, str]:
        tables, ordinary = self._tables()
        match kind:
            case "schema":
                grammar = LLMatcher.grammar_from_json_schema(text, overrides=json.loads(options))
            case "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            case _:
                grammar = LLMatcher.grammar_from_lark(text)
        compiled = _Compiled(lambda: LLMatcher(tables, grammar, log_level=0, limits=_limits()))
        problem = compiled.matcher.get_error()
        if not problem and kind != "choice" and not _can_begin(GrammarState(compiled, ordinary)):
            problem = "it allows no text, or is too complex"
        return compiled, " ".join(problem.split())[:_MAX_PROBLEM]


def _can_begin(state: GrammarState) -> bool:
    """Return whether the first steps of a grammar, with the first allowed token each, stay within the limits."""
    try:
        for _ in range(_NUM_PROBED):
            allowed = state.allowed()
            if not allowed.num_tokens:
                return True
            state.accept(int(allowed.token_ids[0]))
    except RequestFailed:
        return False
    return True


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
    """Return a schema as JSON for the compiler.

    Raises:
        RequestError: it is too large, or not JSON.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False)
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"{what} is larger than {MAX_GRAMMAR_BYTES} bytes")
        return json.dumps(_for_compiler(parse_json(text)), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what} is not JSON: {error}") from None


def _for_compiler(schema: Any) -> Any:
    """Return a schema without options of the compiler and the draft's name that it does not know; escape references."""
    if isinstance(schema, list):
        return [_for_compiler(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "x-guidance" and (key, value) != ("$schema", _LATEST)}
    for key, value in kept.items():
        if key == "$ref" and isinstance(value, str):
            kept[key] = quote(value, safe="%/#~:?@!$&'()*+,;=")
        elif key not in ("const", "enum"):  # which hold values
            kept[key] = _for_compiler(value)
    return kept
