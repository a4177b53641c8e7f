"""The compiler of grammars over tokens, with llguidance. Knows no reply.

A grammar allows ordinary tokens only. Where its text may end, the caller adds the control tokens that end it.
"""

import json
import re
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from mlx_k2.errors import RequestError, RequestFailed
from mlx_k2.json_text.parse import parse_json
from mlx_k2.text.grammar_state import CompiledGrammar, GrammarState
from mlx_k2.text.schema_check import check_schema
from mlx_k2.text.tokenizer import Tokenizer

MAX_GRAMMAR_BYTES = 256 * 1024
"""The largest schema, regular expression or Lark grammar."""
_NUM_CACHED = 256
"""The number of cached compiled grammars. Agents declare the same tools in each request."""
_COMPACT_OPTIONS = {"whitespace_flexible": False}
_SPACED_OPTIONS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""Options that allow an optional space after a separator, since K2 writes arguments in both ways."""
_NUM_TRIAL_STEPS = 32
"""The steps that are tried before a grammar is used: one that is too complex usually fails at its first steps."""
_MAX_PROBLEM_CHARS = 300
_REGEX_REASON = re.compile(r"(?<=^error: ).+", re.MULTILINE)
"""The reason in the compiler's message about a regular expression; the other lines quote its own grammar."""
_LATEST_DRAFT = "http://json-schema.org/schema#"
"""A name of the latest draft of JSON Schema. The compiler refuses it, and assumes this draft if a schema names none."""
_LENIENT_OPTIONS = {"lenient": True, "coerce_one_of": True}
_ANY_OBJECT = {"type": "object"}
_UNSUPPORTED_MESSAGES = (
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
"""Parts of the messages with which the compiler refuses a correct schema whose keywords it does not support."""


def _limits() -> LLParserLimits:
    """Return the limits of one grammar. A step at these limits takes about 10 ms, a usual step less than 0.1 ms."""
    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


class GrammarCompiler:
    """The compiler of grammars over one vocabulary. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._compiled = lru_cache(_NUM_CACHED)(self._compile)
        self._tables = lru_cache(1)(self._read_tables)
        self._lock = threading.Lock()

    def _read_tables(self) -> tuple[LLTokenizer, NDArray[np.int32]]:
        """Return llguidance's tokenizer, and a bit for each ordinary token. Takes 0.5 s for Kimi K2's vocabulary."""
        tokenizer = self.tokenizer
        control_ids = [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.is_special(token_id)]
        if not control_ids:
            raise RequestError("answers cannot be constrained: the model's vocabulary has no control token")
        bits = np.ones(-(-tokenizer.vocab_size // 32) * 32, np.uint8)
        bits[tokenizer.vocab_size :] = 0
        bits[control_ids] = 0
        vocabulary = TokenizerWrapper(_Vocabulary(tokenizer, control_ids))
        table = LLTokenizer(vocabulary, n_vocab=tokenizer.vocab_size, eos_token=control_ids[0])
        return table, np.packbits(bits, bitorder="little").view(np.int32)

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

        A keyword that the compiler does not support is ignored; if it still cannot compile the schema, the grammar
        allows any object. ``is_spaced`` allows a space after each separator. ``what`` names the schema in messages.
        ``is_optional`` treats every problem of the compiler like a keyword that it does not support.

        Raises:
            RequestError: the schema is malformed, too large, refers to another document or has no finite value; or
                ``is_strict`` is True and the compiler does not support a keyword.
        """
        text = _schema_text(schema, what)
        check_schema(schema, what)
        options = _SPACED_OPTIONS if is_spaced else _COMPACT_OPTIONS
        state, problem = self._new_state("schema", text, json.dumps(options))
        if not problem:
            return state, None
        if is_strict or not (is_optional or any(message in problem for message in _UNSUPPORTED_MESSAGES)):
            raise RequestError(f"{what} cannot be enforced: {problem}")
        state, remaining = self._new_state("schema", text, json.dumps(options | _LENIENT_OPTIONS))
        if not remaining:
            return state, f"{what}: keywords that cannot be enforced are ignored: {problem}"
        state, _ = self._new_state("schema", json.dumps(_ANY_OBJECT), json.dumps(options))
        return state, f"{what} cannot be enforced, and any object is allowed: {problem}"

    def text(self, kind: str, grammar: str) -> GrammarState:
        """Return the grammar of a regular expression (``kind`` "regex") or a Lark grammar ("lark", or "choice").

        The first steps of the grammar are tried, except for "choice".

        Raises:
            RequestError: the grammar is malformed, too large or too complex, or allows no text.
        """
        what = "the regular expression" if kind == "regex" else "the Lark grammar"
        if len(grammar.encode(errors="replace")) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"{what} is larger than {MAX_GRAMMAR_BYTES} bytes")
        state, problem = self._new_state(kind, grammar, "{}")
        if problem:
            raise RequestError(f"{what} cannot be compiled: {problem}")
        return state

    def choice(self, texts: Sequence[str]) -> GrammarState:
        """Return a grammar that allows one of ``texts``. Replies call this while they run, so no steps are tried."""
        return self.text("choice", "start: " + " | ".join(map(json.dumps, texts)))

    def _new_state(self, kind: str, text: str, options: str) -> tuple[GrammarState, str]:
        """Return a compiled grammar that has accepted no token; and the compiler's problem, '' for none."""
        with self._lock:  # else several threads could compute the tables at the same time
            _, ordinary = self._tables()
        compiled, problem = self._compiled(kind, text, options)
        return GrammarState(compiled, ordinary), problem

    def _compile(self, kind: str, text: str, options: str) -> tuple[CompiledGrammar, str]:
        table, ordinary = self._tables()
        match kind:
            case "schema":
                grammar = LLMatcher.grammar_from_json_schema(text, overrides=json.loads(options))
            case "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            case _:
                grammar = LLMatcher.grammar_from_lark(text)
        compiled = CompiledGrammar(lambda: LLMatcher(table, grammar, log_level=0, limits=_limits()))
        problem = compiled.matcher.get_error()
        if kind == "regex" and (reason := _REGEX_REASON.search(problem)):
            problem = reason[0]
        if not problem and kind != "choice" and not _stays_within_limits(GrammarState(compiled, ordinary)):
            problem = "it allows no text, or is too complex"
        return compiled, " ".join(problem.split())[:_MAX_PROBLEM_CHARS]


def _stays_within_limits(state: GrammarState) -> bool:
    """Return whether the first _NUM_TRIAL_STEPS steps, each with the first allowed token, raise no error."""
    try:
        for _ in range(_NUM_TRIAL_STEPS):
            allowed = state.allowed()
            if not allowed.num_tokens:
                return True
            state.accept(int(allowed.token_ids[0]))
    except RequestFailed:
        return False
    return True


class _Vocabulary:
    """A tokenizer as llguidance reads it. Control tokens have no bytes, so that no grammar allows them.

    The first control token keeps its bytes: it is llguidance's end token, which GrammarState removes from each result.
    """

    def __init__(self, tokenizer: Tokenizer, control_ids: Sequence[int]) -> None:
        self.eos_token_id = control_ids[0]
        self.bos_token_id = None
        self.special_token_ids = control_ids
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        for token_id in control_ids[1:]:
            self.tokens[token_id] = b""
        self._encode = tokenizer.encode_text

    def __call__(self, text: bytes | str) -> list[int]:
        """Return the ids of ordinary tokens."""
        return self._encode(text.decode() if isinstance(text, bytes) else text)


def _schema_text(schema: object, what: str) -> str:
    """Return a schema as the JSON text that the compiler gets.

    Raises:
        RequestError: the schema is too large, or not JSON.
    """
    try:
        text = json.dumps(schema, ensure_ascii=False)
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            raise RequestError(f"{what} is larger than {MAX_GRAMMAR_BYTES} bytes")
        return json.dumps(_for_compiler(parse_json(text)), ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{what} is not JSON: {error}") from None


def _for_compiler(schema: Any) -> Any:
    """Return a schema with escaped references, without "x-guidance" (compiler options) and the name _LATEST_DRAFT."""
    if isinstance(schema, list):
        return [_for_compiler(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copied: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "x-guidance" or (key, value) == ("$schema", _LATEST_DRAFT):
            continue
        if key == "$ref" and isinstance(value, str):
            copied[key] = quote(value, safe="%/#~:?@!$&'()*+,;=")
        elif key in ("const", "enum"):  # they hold values, not schemas
            copied[key] = value
        else:
            copied[key] = _for_compiler(value)
    return copied
