"""The options of a reply as a user sets them, and its settings with the recommendations of a checkpoint."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from mlx_k2.chat.chat_session import MAX_TOOL_CALLS, ReplySettings
from mlx_k2.coordinator.reply_policy import ReplyLimits
from mlx_k2.errors import RequestError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import convert
from mlx_k2.sampling import GenerationConfig, Sampling
from mlx_k2.text.chat_template import INSTANT_TEMPERATURE, ThinkingMode
from mlx_k2.text.constraint import AnswerForm, AnswerFormat, Constraint, tool_rules
from mlx_k2.text.reply_grammar import compile_constraint
from mlx_k2.weights.model_frontend import ModelFrontend

MAX_ANSWERS = 128
MAX_STOP_STRINGS = 64
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SAMPLING_NAMES = (*_RECOMMENDED, "presence_penalty", "frequency_penalty")
"""The options that are parameters of the sampler under the same name."""
_UNSET = GenerationConfig()


class SamplingOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Options of a reply: how it is sampled, how long it may be and whether the model thinks.

    None selects the checkpoint's recommendation, else the value that changes nothing; for ``seed`` a random one, as -1
    does, for ``max_tokens`` what fits into the context.

    Raises:
        RequestError: a value has the wrong type, or is out of range.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: float | None = None
    """0 takes the most likely token. Without thinking the default is 0.6, which Moonshot recommends."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    timeout_s: float | None = msgspec.field(default=None, name="timeout")
    """The reply ends after this time, counted from the start of its prefill, with the tokens so far."""
    thinking: bool | None = None
    preserve_thinking: bool | None = None
    """Whether the reasoning of earlier replies stays in the prompt."""
    thinking_budget: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """The reasoning is closed after this number of its tokens."""
    stop: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_STOP_STRINGS)] = ()
    """The reply ends before the first of these texts in its answer."""
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Before this number of tokens the reply does not end."""
    ignore_eos: bool = False
    """Whether the reply continues after a token that ends a turn, up to ``max_tokens``."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] = {}
    """Numbers that are added to the logits of these token ids."""
    num_answers: Annotated[int, msgspec.Meta(ge=1, le=MAX_ANSWERS)] = msgspec.field(default=1, name="n")
    """The number of replies to the same prompt, each with its own seed."""
    json_schema: dict[str, Any] | None = None
    """The answer is a JSON value of this schema."""
    strict_schema: bool = False
    """Whether a schema of the answer with a keyword that cannot be enforced is refused, in place of a warning."""
    regex: str | None = None
    """The answer matches this regular expression as a whole."""
    lark: str | None = None
    """The answer follows this Lark grammar."""
    tool_choice: str | None = None
    """``auto``, ``none``, ``required``, or the name of the tool that is called."""
    parallel_tool_calls: bool = True
    """Whether a reply may call several tools."""
    tool_grammar: bool = True
    """Whether calls that the model makes by its own choice follow the schemas of the tools."""

    def __post_init__(self) -> None:
        """Check every value, before anything is loaded."""
        if isinstance(self.stop, str):
            raise RequestError(f"stop is a text: give a tuple of texts, as in ({self.stop!r},)")
        try:
            convert(msgspec.structs.asdict(self), _CHECKED, str_keys=False)
        except JsonError as error:
            raise RequestError(f"a sampling value has the wrong type: {error}") from None
        self.resolved(_UNSET)
        ReplyLimits(self.stop)
        try:
            "".join((self.regex or "", self.lark or "", *self.stop)).encode()
        except UnicodeEncodeError:
            raise RequestError("a stop string, regular expression or grammar is not UTF-8 text") from None
        if self.timeout_s is not None and not self.timeout_s > 0:  # also rejects NaN
            raise RequestError(f"timeout is {self.timeout_s:g} s: give more than 0")
        if sum(form is not None for form in (self.json_schema, self.regex, self.lark)) > 1:
            raise RequestError("an answer has one form: give a JSON schema, a regular expression or a Lark grammar")

    @property
    def mode(self) -> ThinkingMode:
        """The mode in which the model thinks."""
        return ThinkingMode(self.thinking, bool(self.preserve_thinking))

    @property
    def is_for_replies(self) -> bool:
        """Whether an option is set that a raw prompt does not have."""
        given = (self.thinking, self.preserve_thinking or None, self.thinking_budget, self.tool_choice)
        return any(value is not None for value in given)

    def resolved(self, recommended: GenerationConfig, num_logprobs: int | None = None) -> Sampling:
        """Return the sampler's parameters."""
        given = {name: getattr(self, name) for name in SAMPLING_NAMES}
        biases = tuple(self.logit_bias.items())
        return resolved_sampling(given, recommended, self.base_seed, biases, num_logprobs, thinking=self.thinking)

    def constraint(self, declarations: Sequence[Mapping[str, object]] = ()) -> Constraint | None:
        """Return the constraint of replies that may call the tools of ``declarations``; None if all is allowed.

        Raises:
            RequestError: the tool choice is unknown, or names no declared tool.
        """
        texts = ((AnswerForm.REGEX, self.regex), (AnswerForm.LARK, self.lark))
        answer = next((AnswerFormat(form, text) for form, text in texts if text is not None), None)
        if self.json_schema is not None:
            answer = AnswerFormat(AnswerForm.JSON_SCHEMA, schema=self.json_schema, is_strict=self.strict_schema)
        if answer is None and not declarations and self.tool_choice is None:
            return None
        is_word = self.tool_choice in (None, "auto", "none", "required")
        choice = self.tool_choice if is_word else {"function": {"name": self.tool_choice}}
        rules = tool_rules(declarations, choice, is_parallel=self.parallel_tool_calls, has_grammar=self.tool_grammar)
        return Constraint(answer, rules)

    @property
    def base_seed(self) -> int:
        """The seed, or a random one of 32 bits for None and -1."""
        return secrets.randbits(32) if self.seed in (None, -1) else self.seed


_CHECKED = msgspec.defstruct("_CHECKED", [(one.name, one.type) for one in msgspec.structs.fields(SamplingOptions)])
"""The fields of SamplingOptions by their names in Python. msgspec checks no type where a struct is built in Python."""


def resolved_sampling(
    given: Mapping[str, float | None],
    recommended: GenerationConfig,
    seed: int,
    logit_bias: tuple[tuple[int, float], ...],
    num_logprobs: int | None,
    *,
    thinking: bool | None,
) -> Sampling:
    """Return the sampler's parameters: the values of SAMPLING_NAMES that are given, else the recommended ones.

    A ``top_k`` of 0 keeps all tokens, and a ``top_p`` of 0 takes the most likely token, as in other programs.

    Raises:
        RequestError: a value is out of range; the message begins with its name.
    """
    values: dict[str, Any] = {name: getattr(recommended, name) for name in _RECOMMENDED}
    if thinking is False:
        values["temperature"] = INSTANT_TEMPERATURE
    values |= {name: value for name, value in given.items() if value is not None}
    chosen = {name: value for name, value in values.items() if value is not None}
    if chosen.get("top_k") == 0:
        del chosen["top_k"]
    if chosen.get("top_p") == 0:
        chosen |= {"top_p": 1.0, "temperature": 0.0}
    return Sampling(seed=seed, num_logprobs=num_logprobs, logit_bias=logit_bias, **chosen)


def reply_settings(
    options: SamplingOptions,
    frontend: ModelFrontend,
    declarations: Sequence[Mapping[str, object]] = (),
    *,
    max_tool_calls: int = MAX_TOOL_CALLS,
    num_logprobs: int | None = None,
) -> ReplySettings:
    """Return the settings of replies of a model: the options, else the checkpoint's recommendations.

    The replies may call the tools of ``declarations``.

    Raises:
        RequestError: a schema or a grammar cannot be used, or the chosen tool is not declared.
    """
    constraint = options.constraint(declarations)
    return ReplySettings(
        sampling=options.resolved(frontend.recommended, num_logprobs),
        max_tokens=frontend.context_tokens if options.max_tokens is None else options.max_tokens,
        stop_ids=frozenset() if options.ignore_eos else frontend.stop_ids,
        timeout_s=options.timeout_s,
        context_tokens=frontend.context_tokens,
        limits=ReplyLimits(options.stop, options.min_tokens, options.thinking_budget),
        grammar=None if constraint is None else compile_constraint(frontend.grammars, constraint),
        max_tool_calls=max_tool_calls,
    )
