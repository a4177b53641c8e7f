"""Compiled constraint of a reply, and the guide of a reply: the tokens that may follow in each of its phases.

The reply parser decides the phase. Only a control token changes it, and a draft token is never a control token.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from mlx_k2.errors import RequestError, RequestFailed
from mlx_k2.text.constraint import AnswerForm, Constraint, ToolChoice, ToolRules
from mlx_k2.text.grammar import GrammarCompiler
from mlx_k2.text.grammar_state import AllowedTokens, GrammarState
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
_MAX_PREFIXES = 64
"""If more tokens are allowed, the text is not forced: a forced text allows only the tokens that are its prefixes."""
MAX_CALLS = 16
"""The most calls of a constrained reply, so that a reply that repeats a call ends. The next reply can make more."""
_NO_PARAMETERS = {"type": "object", "additionalProperties": False}
_NO_TOOLS = ToolRules(choice=ToolChoice.NONE)


@dataclass(frozen=True)
class ReplyGrammar:
    """A compiled constraint. Several replies may use it at the same time."""

    compiler: GrammarCompiler
    answer: GrammarState | None
    """The grammar of the answer text; None allows any text."""
    rules: ToolRules
    arguments: Mapping[str, GrammarState]
    """The grammars of the arguments by the tool's name; empty if calls are not constrained."""
    warnings: tuple[str, ...]
    """Lines about schemas whose grammar allows more than the schema."""

    def after_calls(self) -> "ReplyGrammar":
        """Return the constraint of the next reply, after the results of the tools: it need not call a tool again."""
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
            schema = _arguments_schema(tool.parameters, what)
            arguments[tool.name], warning = compiler.json_schema(
                schema,
                what,
                is_strict=tool.is_strict,
                is_spaced=True,
                is_optional=rules.choice is ToolChoice.AUTO,  # a reply need not call the tool
            )
            warnings.append(warning)
        compiler.choice([call_id(name, 0) for name in arguments])  # refuses too many or too long names
    answer: GrammarState | None = None
    answer_format = constraint.answer
    if answer_format is not None and answer_format.form is AnswerForm.JSON_SCHEMA:
        what, is_strict = "the JSON schema", answer_format.is_strict
        answer, warning = compiler.json_schema(answer_format.schema, what, is_strict=is_strict)
        warnings.append(warning)
    elif answer_format is not None:
        answer = compiler.text(answer_format.form.value, answer_format.text)
    return ReplyGrammar(compiler, answer, rules, arguments, tuple(line for line in warnings if line is not None))


def _arguments_schema(parameters: object, what: str) -> object:
    """Return the schema of a tool's arguments with the type "object", which ``parameters`` may leave out.

    Raises:
        RequestError: ``parameters`` allows no object.
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
    """The tokens that may follow: those that ``state`` allows, ``ends`` where its text may end, and ``extra``.

    Without a state, all but ``banned`` may follow; if ``banned`` is None, only ``extra``.
    """

    state: GrammarState | None = None
    ends: tuple[int, ...] = ()
    extra: tuple[int, ...] = ()
    banned: tuple[int, ...] | None = None


class ReplyGuide:
    """The tokens that may follow in one reply, which begins in ``phase``. A raw reply has the phase content only.

    Its methods raise RequestFailed if a grammar exceeds its limits.
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
        usual_stop = self._ids.get(_STOP)  # sorted first, because ``forced`` chooses the first stop token
        self._stop_ids = tuple(sorted(stop_ids, key=lambda token_id: (token_id != usual_stop, token_id)))
        self._markers = tuple(self._ids[name] for name in _TOOL_MARKERS if name in self._ids)
        rules = grammar.rules
        self._must_call = rules.choice is ToolChoice.REQUIRED
        self._may_call = rules.choice is not ToolChoice.NONE and bool(rules.tools)
        num_prompt_calls = prompt_ids.count(self._ids[_CALL_BEGIN]) if _CALL_BEGIN in self._ids else 0
        self._next_number = num_prompt_calls if rules.first_number is None else rules.first_number
        think_ids = (self._ids.get(_THINK_BEGIN), self._ids.get(_THINK_END))
        last_control = next((token_id for token_id in reversed(prompt_ids) if tokenizer.is_special(token_id)), None)
        # A prompt that ends with a think token has decided already whether the reply begins with reasoning.
        self._may_think = think_ids[0] is not None and last_control not in think_ids and not is_raw
        self._phase = phase
        self._state: GrammarState | None = None
        self._call_names: dict[str, str] = {}  # the tools' names by the ids that the call may have
        self._header = b""  # the id of the call so far
        self._num_calls = 0
        self._is_phase_empty = True
        self._may_end_section = False
        self._may_have_drafts = True
        self._allowed: dict[tuple[int, ...], AllowedTokens] = {}
        """Cached results of the grammar, by the draft tokens after the accepted ones."""
        self._enter(self._phase)

    @property
    def is_complete(self) -> bool:
        """True if no token may follow: the grammar has ended, and the request has no stop token."""
        rule = self._rule()
        if rule.banned is not None or rule.extra or rule.ends:
            return False
        return rule.state is None or not self._allowed_after(()).num_tokens

    def accept(self, token_id: int, phase: Phase) -> None:
        """Add the next token; ``phase`` is the phase after it."""
        if phase is not self._phase:
            self._enter(phase)
        else:
            self._is_phase_empty = False
            if self._state is not None and not self._tokenizer.is_special(token_id):
                self._state.accept(token_id)
                if phase is Phase.CALL_ID:
                    self._header += self._tokenizer.token_bytes(token_id)
        self._allowed = {ids[1:]: allowed for ids, allowed in self._allowed.items() if ids[:1] == (token_id,)}

    def forced(self) -> Sequence[int]:
        """Return the tokens that must follow; () if there is a choice."""
        rule = self._rule()
        if rule.banned is not None:
            return ()
        if rule.state is None:
            has_choice = len(rule.extra) > 1 and rule.extra != self._stop_ids  # several stop tokens are no choice
            return () if has_choice else rule.extra[:1]
        if rule.extra:
            return ()
        allowed = self._allowed_after(())
        if not allowed.num_tokens:
            return rule.ends[:1]
        if allowed.may_end or allowed.num_tokens > _MAX_PREFIXES:
            return ()
        return rule.state.forced() or (allowed.token_ids.tolist() if allowed.num_tokens == 1 else ())

    def mask(self, draft_ids: Sequence[int], *, hold_stop: bool) -> TokenMask | None:
        """Return the mask for the token after the accepted tokens and then ``draft_ids``; None allows every token.

        ``hold_stop`` excludes the stop tokens, unless the grammar allows no other token.
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
        extra = () if draft_ids else rule.extra  # only the first token of a phase may be one of ``extra``
        return allowed.mask((*ends, *extra), self._tokenizer.vocab_size)

    def may_draft(self, draft_ids: Sequence[int], token_id: int) -> bool:
        """Return whether the ordinary token ``token_id`` may follow ``draft_ids`` within the grammar's limits.

        After the first draft token that exceeds the limits the result is always False: a wrong draft token can exceed
        them where the answer does not, and each attempt takes long.
        """
        mask = self.mask(draft_ids, hold_stop=False)
        if not self._may_have_drafts or (mask is not None and not mask.allows(token_id)):
            return False
        if self._state is not None:
            try:
                self._allowed_after((*draft_ids, token_id))
            except RequestFailed:
                self._may_have_drafts = False
        return self._may_have_drafts

    def _allowed_after(self, draft_ids: Sequence[int]) -> AllowedTokens:
        assert self._state is not None, "the phase has a grammar"
        key = tuple(draft_ids)
        if key not in self._allowed:
            self._allowed[key] = self._state.allowed(key)
        return self._allowed[key]

    def _enter(self, phase: Phase) -> None:
        """Begin a phase with its grammar."""
        grammar = self._grammar
        self._may_end_section = self._phase is Phase.ARGUMENTS  # the phase before: a section has at least one call
        self._phase, self._is_phase_empty, self._state = phase, True, None
        match phase:
            case Phase.REASONING:
                self._may_think = False
            case Phase.CONTENT if grammar.answer is not None and not self._must_call and not self._num_calls:
                self._state = grammar.answer.copy()
            case Phase.CALL_ID:
                self._num_calls += 1
                if grammar.arguments:
                    only = grammar.rules.only
                    names = grammar.arguments if only is None else (only,)
                    self._call_names = {call_id(name, self._next_number): name for name in names}
                    self._header = b""
                    self._state = grammar.compiler.choice(list(self._call_names))
                self._next_number += 1
            case Phase.ARGUMENTS if grammar.arguments:
                self._state = grammar.arguments[self._call_names[self._header.decode()]].copy()

    def _rule(self) -> _Rule:
        """Return the rule for the next token in the current phase."""
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
                extra = [ids[_CALL_BEGIN]] if self._may_call_now else []
                if self._may_end_section or not extra:
                    extra.append(ids[_SECTION_END])
                return _Rule(extra=tuple(extra))
            case Phase.CALL_ID if self._state is not None:
                return _Rule(self._state, ends=(ids[_ARGUMENTS_BEGIN],))
            case Phase.ARGUMENTS if self._state is not None:
                return _Rule(self._state, ends=(ids[_CALL_END],))
            case _:  # an unconstrained call, in which a call marker would begin the next call
                is_last = not self._may_call_now and not grammar.rules.is_parallel
                return _Rule(banned=(ids[_CALL_BEGIN],) if is_last and _CALL_BEGIN in ids else ())

    @property
    def _may_call_now(self) -> bool:
        return self._may_call and self._num_calls < (MAX_CALLS if self._grammar.rules.is_parallel else 1)

    @property
    def _banned_markers(self) -> tuple[int, ...]:
        return () if self._may_call_now else self._markers

    def _content_rule(self) -> _Rule:
        """Return the rule for the content. A constrained reply ends after its tool section."""
        is_constrained = self._must_call or self._grammar.answer is not None
        if not is_constrained:
            return _Rule(banned=self._banned_markers)
        if self._num_calls:
            return _Rule(extra=self._stop_ids)
        at_start = self._is_phase_empty
        think = (self._ids[_THINK_BEGIN],) if at_start and self._may_think else ()
        if self._must_call:
            return _Rule(extra=(*think, self._ids[_SECTION_BEGIN]))
        section = (self._ids[_SECTION_BEGIN],) if at_start and self._may_call else ()
        return _Rule(self._state, ends=self._stop_ids, extra=(*think, *section))
