"""Compiled constraint of a reply, and its guide: which tokens may follow in each phase of the reply.

The reply parser decides the phase. A phase changes at a control token only, and a draft token is never one.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_k2.errors import RequestError, RequestFailed
from mlx_k2.text.constraint import AnswerForm, Constraint, ToolChoice, ToolRules
from mlx_k2.text.grammar import Allowed, GrammarCompiler, GrammarState
from mlx_k2.text.reply_parser import Phase
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.text.tool_call import call_id
from mlx_k2.token_mask import TokenMask

_THINK_BEGIN, _THINK_END = "<think>", "</think>"
_SECTION_BEGIN, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL_BEGIN, _ARGUMENTS_BEGIN = "<|tool_call_begin|>", "<|tool_call_argument_begin|>"
_CALL_END = "<|tool_call_end|>"
_TOOL_MARKERS = (_SECTION_BEGIN, _SECTION_END, _CALL_BEGIN, _ARGUMENTS_BEGIN, _CALL_END)
_STOP = "<|im_end|>"
_MOST_PREFIXES = 64
"""A text that is forced allows only the tokens with which it begins. With more tokens than this there is a choice."""
MAX_CALLS = 16
"""The most calls of a constrained reply, which ends a repetition. The model makes further ones in its next reply."""
_NO_PARAMETERS = {"type": "object", "additionalProperties": False}
_NO_TOOLS = ToolRules(choice=ToolChoice.NONE)


@dataclass(frozen=True)
class ReplyGrammar:
    """A compiled constraint. Several replies may use it."""

    compiler: GrammarCompiler
    answer: GrammarState | None
    """The grammar of the answer text; None allows any."""
    rules: ToolRules
    arguments: Mapping[str, GrammarState]
    """The grammar of each tool's arguments by its name; empty if calls are not constrained."""
    warnings: tuple[str, ...]
    """Lines about schemas whose grammar allows more than the schema."""

    def after_calls(self) -> "ReplyGrammar":
        """Return the constraint of the reply to the results of tools, which need not call one again."""
        if self.rules.choice is not ToolChoice.REQUIRED:
            return self
        rules = replace(self.rules, choice=ToolChoice.AUTO, only=None, first_number=None)
        return replace(self, rules=rules, arguments=self.arguments if rules.has_grammar else {})


def compile_constraint(compiler: GrammarCompiler, constraint: Constraint) -> ReplyGrammar:
    """Return the compiled constraint.

    Raises:
        RequestError: a schema or a grammar cannot be used, or the model's vocabulary has no markers for tool calls.
    """
    rules = constraint.tools or _NO_TOOLS
    warnings: list[str | None] = []
    arguments: dict[str, GrammarState] = {}
    if rules.choice is ToolChoice.REQUIRED or (rules.choice is ToolChoice.AUTO and rules.tools and rules.has_grammar):
        if missing := [name for name in _TOOL_MARKERS if name not in compiler.tokenizer.special_ids]:
            raise RequestError(f"tool calls cannot be constrained: the model's vocabulary has no {missing[0]}")
        for tool in rules.tools:
            what = f"the schema of tool {tool.name!r}"
            schema = _of_object(tool.parameters, what)
            arguments[tool.name], warning = compiler.json_schema(
                schema,
                what,
                is_strict=tool.is_strict,
                is_spaced=True,
                is_optional=rules.choice is ToolChoice.AUTO,
            )
            warnings.append(warning)
        compiler.choice([call_id(name, 0) for name in arguments])  # refuses too many names, or names too long
    answer: GrammarState | None = None
    form = constraint.answer
    if form is not None and form.form is AnswerForm.JSON_SCHEMA:
        answer, warning = compiler.json_schema(form.schema, "the JSON schema", is_strict=form.is_strict)
        warnings.append(warning)
    elif form is not None:
        answer = compiler.text(form.form.value, form.text)
    return ReplyGrammar(compiler, answer, rules, arguments, tuple(line for line in warnings if line is not None))


def _of_object(parameters: object, what: str) -> object:
    """Return the schema of a tool's arguments, which are an object, also where the schema does not say so.

    Raises:
        RequestError: the schema allows no object.
    """
    if parameters is None:
        return _NO_PARAMETERS
    if not isinstance(parameters, Mapping):
        return parameters  # the compiler refuses it
    kind = parameters.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise RequestError(f"{what} has the type {kind!r}: arguments are an object")
    return {**parameters, "type": "object"}


@dataclass(frozen=True)
class _Rule:
    """The tokens that may follow: those of ``state``, ``ends`` where it may end, and ``extra``.

    Without a state: ``extra`` only, or if ``banned`` is set, all but these.
    """

    state: GrammarState | None = None
    ends: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    banned: tuple[int, ...] | None = None


class ReplyGuide:
    """The guide of one reply, which begins in ``phase``; of a raw one it is content to the end.

    Its methods raise RequestFailed when a grammar is too complex to continue.
    """

    def __init__(
        self,
        grammar: ReplyGrammar,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop_ids: Collection[int],
        phase: Phase,
        *,
        is_raw: bool = False,
    ) -> None:
        self._grammar = grammar
        self._tokenizer = tokenizer
        self._ids = tokenizer.special_ids
        first = self._ids.get(_STOP)  # the usual end of a turn comes first, because the first one is forced
        self._stop_ids = tuple(sorted(stop_ids, key=lambda number: (number != first, number)))
        self._markers = tuple(self._ids[name] for name in _TOOL_MARKERS if name in self._ids)
        rules = grammar.rules
        self._must_call = rules.choice is ToolChoice.REQUIRED
        self._may_call = rules.choice is not ToolChoice.NONE and bool(rules.tools)
        in_prompt = prompt_ids.count(self._ids[_CALL_BEGIN]) if _CALL_BEGIN in self._ids else 0
        self._next_number = in_prompt if rules.first_number is None else rules.first_number
        thinks = (self._ids.get(_THINK_BEGIN), self._ids.get(_THINK_END))
        last = next((number for number in reversed(prompt_ids) if tokenizer.is_special(number)), None)
        self._may_think = thinks[0] is not None and last not in thinks and not is_raw  # else the prompt has decided
        self._phase = phase
        self._state: GrammarState | None = None
        self._call_names: dict[str, str] = {}
        self._header = b""
        self._num_calls = 0
        self._is_phase_begun = False
        self._may_end_section = False
        self._has_drafts = True
        self._allowed: dict[tuple[int, ...], Allowed] = {}
        self._enter(self._phase)

    @property
    def is_complete(self) -> bool:
        """True if no token may follow, since the request has no stop token."""
        rule = self._rule()
        if rule.banned is not None or rule.extra or rule.ends:
            return False
        return rule.state is None or not self._allowed_after(()).num_tokens

    def accept(self, token_id: int, phase: Phase) -> None:
        """Record the next token, and the phase after it."""
        if phase is not self._phase:
            self._enter(phase)
        else:
            self._is_phase_begun = True
            if self._state is not None and not self._tokenizer.is_special(token_id):
                self._state.accept(token_id)
                if phase is Phase.CALL_ID:
                    self._header += self._tokenizer.token_bytes(token_id)
        self._allowed = {ids[1:]: found for ids, found in self._allowed.items() if ids[:1] == (token_id,)}

    def forced(self) -> Sequence[int]:
        """Return the tokens that must follow; nothing if there is a choice."""
        rule = self._rule()
        if rule.banned is not None:
            return ()
        if rule.state is None:
            return rule.extra[:1] if len(rule.extra) == 1 or rule.extra == self._stop_ids else ()
        if rule.extra:
            return ()
        allowed = self._allowed_after(())
        if not allowed.num_tokens:
            return rule.ends[:1]
        if allowed.may_end or allowed.num_tokens > _MOST_PREFIXES:
            return ()
        return rule.state.forced() or (allowed.token_ids.tolist() if allowed.num_tokens == 1 else ())

    def mask(self, draft_ids: Sequence[int], *, hold_stop: bool) -> TokenMask | None:
        """Return the mask for the token after the accepted ones and ``draft_ids``; None allows every token.

        ``hold_stop`` excludes the stop tokens, unless the grammar allows nothing else.
        """
        rule = self._rule()
        if rule.banned is not None:
            banned = {*rule.banned, *self._stop_ids} if hold_stop else rule.banned
            return TokenMask.all_but(banned) if banned else None
        if rule.state is None:
            return TokenMask.only(rule.extra)
        allowed = self._allowed_after(draft_ids)
        ends = rule.ends if allowed.may_end else ()
        if hold_stop and allowed.num_tokens and ends == self._stop_ids:
            ends = ()
        extra = () if draft_ids else rule.extra
        return allowed.mask((*ends, *extra), self._tokenizer.vocab_size)

    def may_draft(self, draft_ids: Sequence[int], token_id: int) -> bool:
        """Return whether the ordinary token ``token_id`` may follow ``draft_ids``, and the grammar continue after it.

        A wrong draft token can exceed the grammar's limits where the answer does not. The reply gets no further drafts
        then, which could take as long.
        """
        mask = self.mask(draft_ids, hold_stop=False)
        if not self._has_drafts or (mask is not None and not mask.allows(token_id)):
            return False
        if self._state is not None:
            try:
                self._allowed_after((*draft_ids, token_id))
            except RequestFailed:
                self._has_drafts = False
        return self._has_drafts

    def _allowed_after(self, draft_ids: Sequence[int]) -> Allowed:
        assert self._state is not None, "only a grammar allows tokens"
        key = tuple(draft_ids)
        if key not in self._allowed:
            self._allowed[key] = self._state.allowed(key)
        return self._allowed[key]

    def _enter(self, phase: Phase) -> None:
        """Begin a phase with its grammar."""
        grammar = self._grammar
        self._may_end_section = self._phase is Phase.ARGUMENTS
        self._phase, self._is_phase_begun, self._state = phase, False, None
        match phase:
            case Phase.REASONING:
                self._may_think = False
            case Phase.CONTENT if grammar.answer is not None and not self._must_call and not self._num_calls:
                self._state = grammar.answer.copy()
            case Phase.CALL_ID:
                self._num_calls += 1
                if grammar.arguments:
                    only = grammar.rules.only
                    allowed = grammar.arguments if only is None else (only,)
                    names = {call_id(name, self._next_number): name for name in allowed}
                    self._call_names, self._header = names, b""
                    self._state = grammar.compiler.choice(list(names))
                self._next_number += 1
            case Phase.ARGUMENTS if grammar.arguments:
                self._state = grammar.arguments[self._call_names[self._header.decode()]].copy()

    def _rule(self) -> _Rule:
        grammar, ids = self._grammar, self._ids
        match self._phase:
            case Phase.REASONING:
                needs_more = self._must_call or grammar.answer is not None
                return _Rule(banned=(*self._banned_markers, *(self._stop_ids if needs_more else ())))
            case Phase.CONTENT:
                return self._content_rule()
            case Phase.SECTION:
                if not grammar.arguments and grammar.rules.is_parallel:
                    return _Rule(banned=())
                begin = (ids[_CALL_BEGIN],) if self._may_call_now else ()
                return _Rule(extra=(*begin, *((ids[_SECTION_END],) if self._may_end_section or not begin else ())))
            case Phase.CALL_ID if self._state is not None:
                return _Rule(self._state, ends=(ids[_ARGUMENTS_BEGIN],))
            case Phase.ARGUMENTS if self._state is not None:
                return _Rule(self._state, ends=(ids[_CALL_END],))
            case _:
                is_last = not self._may_call_now and not grammar.rules.is_parallel
                return _Rule(banned=(ids[_CALL_BEGIN],) if is_last and _CALL_BEGIN in ids else ())

    @property
    def _may_call_now(self) -> bool:
        return self._may_call and self._num_calls < (MAX_CALLS if self._grammar.rules.is_parallel else 1)

    @property
    def _banned_markers(self) -> tuple[int, ...]:
        return () if self._may_call_now else self._markers

    def _content_rule(self) -> _Rule:
        """Return the rule for the text after the reasoning. A constrained reply ends with its tool section."""
        is_constrained = self._must_call or self._grammar.answer is not None
        if not is_constrained:
            return _Rule(banned=self._banned_markers)
        if self._num_calls:
            return _Rule(extra=self._stop_ids)
        at_start = not self._is_phase_begun
        think = (self._ids[_THINK_BEGIN],) if at_start and self._may_think else ()
        if self._must_call:
            return _Rule(extra=(*think, self._ids[_SECTION_BEGIN]))
        section = (self._ids[_SECTION_BEGIN],) if at_start and self._may_call else ()
        return _Rule(self._state, ends=self._stop_ids, extra=(*think, *section))
