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
_RECOMMENDED_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SAMPLING_NAMES = (*_RECOMMENDED_NAMES, "presence_penalty", "frequency_penalty")
"""The options that are parameters of the sampler under the same name."""
_NO_RECOMMENDATIONS = GenerationConfig()


class SamplingOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Options of a reply: how it is sampled, how long it may be and whether the model thinks.

    A parameter of the sampler that is None has the checkpoint's recommended value; without one, a value that has no
    effect. ``seed`` None or -1 is a random seed, ``max_tokens`` None the rest of the context.

    Raises:
        RequestError: a value has the wrong type, or is out of range.
    """

    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: float | None = None
    """0 selects the most likely token. Without thinking the default is 0.6, which Moonshot recommends."""
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    timeout_s: float | None = msgspec.field(default=None, name="timeout")
    """Seconds from the start of the prefill after which the reply ends, with the tokens so far."""
    thinking: bool | None = None
    preserve_thinking: bool | None = None
    """Whether the reasoning of earlier replies stays in the prompt."""
    thinking_budget: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Maximum number of tokens of reasoning, which is then closed."""
    stop: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_STOP_STRINGS)] = ()
    """Stop strings: the reply ends before the first of them."""
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Minimum number of tokens of the reply."""
    ignore_eos: bool = False
    """Whether the reply continues after a token that ends a turn, up to ``max_tokens``."""
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] = {}
    """The number that is added to the logit of each of these token ids."""
    num_answers: Annotated[int, msgspec.Meta(ge=1, le=MAX_ANSWERS)] = msgspec.field(default=1, name="n")
    """The number of replies to the same prompt, each with its own seed."""
    json_schema: dict[str, Any] | None = None
    """The JSON schema of the answer."""
    strict_schema: bool = False
    """Whether a keyword of ``json_schema`` that cannot be enforced is an error instead of a warning."""
    regex: str | None = None
    """The regular expression that matches the complete answer."""
    lark: str | None = None
    """The Lark grammar of the answer."""
    tool_choice: str | None = None
    """``auto``, ``none``, ``required``, or the name of the tool to call."""
    parallel_tool_calls: bool = True
    """Whether a reply may call several tools."""
    tool_grammar: bool = True
    """Whether tool calls are constrained to the tools' schemas when ``tool_choice`` does not require a call."""

    def __post_init__(self) -> None:
        """Check every value."""
        if isinstance(self.stop, str):
            raise RequestError(f"stop is a text: give a tuple of texts, as in ({self.stop!r},)")
        try:
            convert(msgspec.structs.asdict(self), _CheckedOptions, str_keys=False)
        except JsonError as error:
            raise RequestError(f"a sampling value has the wrong type: {error}") from None
        self.sampler_parameters(_NO_RECOMMENDATIONS)  # Sampling and ReplyLimits check their values
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
        """The mode of thinking."""
        return ThinkingMode(self.thinking, bool(self.preserve_thinking))

    @property
    def needs_template(self) -> bool:
        """Whether an option is set that applies to prompts with a chat template only."""
        options = (self.thinking, self.thinking_budget, self.tool_choice)
        return self.preserve_thinking is True or any(value is not None for value in options)

    def sampler_parameters(self, recommended: GenerationConfig, num_logprobs: int | None = None) -> Sampling:
        """Return the sampler's parameters.

        Raises:
            RequestError: a value is out of range; the message begins with its name.
        """
        options = {name: getattr(self, name) for name in SAMPLING_NAMES}
        biases = tuple(self.logit_bias.items())
        return resolved_sampling(options, recommended, self.base_seed, biases, num_logprobs, thinking=self.thinking)

    def constraint(self, declarations: Sequence[Mapping[str, object]] = ()) -> Constraint | None:
        """Return the constraint of replies that may call the tools of ``declarations``; None if all is allowed.

        Raises:
            RequestError: ``tool_choice`` names no declared tool.
        """
        answer = None
        if self.json_schema is not None:
            answer = AnswerFormat(AnswerForm.JSON_SCHEMA, schema=self.json_schema, is_strict=self.strict_schema)
        elif self.regex is not None:
            answer = AnswerFormat(AnswerForm.REGEX, self.regex)
        elif self.lark is not None:
            answer = AnswerFormat(AnswerForm.LARK, self.lark)
        if answer is None and not declarations and self.tool_choice is None:
            return None
        names_tool = self.tool_choice not in (None, "auto", "none", "required")
        choice = {"function": {"name": self.tool_choice}} if names_tool else self.tool_choice
        rules = tool_rules(declarations, choice, is_parallel=self.parallel_tool_calls, has_grammar=self.tool_grammar)
        return Constraint(answer, rules)

    @property
    def base_seed(self) -> int:
        """The seed; for None and -1 a random one of 32 bits, another one at each read."""
        return secrets.randbits(32) if self.seed in (None, -1) else self.seed


_CheckedOptions = msgspec.defstruct(
    "_CheckedOptions", [(field.name, field.type) for field in msgspec.structs.fields(SamplingOptions)]
)
"""The fields of SamplingOptions, for ``convert``: msgspec does not check types when Python code makes a struct."""


def resolved_sampling(
    options: Mapping[str, float | None],
    recommended: GenerationConfig,
    seed: int,
    logit_bias: tuple[tuple[int, float], ...],
    num_logprobs: int | None,
    *,
    thinking: bool | None,
) -> Sampling:
    """Return the sampler's parameters: ``options`` by the names in SAMPLING_NAMES; for None, the recommended value.

    A ``top_k`` of 0 keeps all tokens, and a ``top_p`` of 0 selects the most likely token, as in other programs.

    Raises:
        RequestError: a value is out of range; the message begins with its name.
    """
    values: dict[str, Any] = {name: getattr(recommended, name) for name in _RECOMMENDED_NAMES}
    if thinking is False:
        values["temperature"] = INSTANT_TEMPERATURE
    values |= {name: value for name, value in options.items() if value is not None}
    parameters = {name: value for name, value in values.items() if value is not None}
    if parameters.get("top_k") == 0:
        del parameters["top_k"]
    if parameters.get("top_p") == 0:
        parameters |= {"top_p": 1.0, "temperature": 0.0}
    return Sampling(seed=seed, num_logprobs=num_logprobs, logit_bias=logit_bias, **parameters)


def reply_settings(
    options: SamplingOptions,
    frontend: ModelFrontend,
    declarations: Sequence[Mapping[str, object]] = (),
    *,
    max_tool_calls: int = MAX_TOOL_CALLS,
    num_logprobs: int | None = None,
) -> ReplySettings:
    """Return the settings of a model's replies, which may call the tools of ``declarations``.

    Raises:
        RequestError: a schema or a grammar cannot be used, or ``tool_choice`` names no declared tool.
    """
    constraint = options.constraint(declarations)
    return ReplySettings(
        sampling=options.sampler_parameters(frontend.recommended, num_logprobs),
        max_tokens=frontend.context_tokens if options.max_tokens is None else options.max_tokens,
        stop_ids=frozenset() if options.ignore_eos else frontend.stop_ids,
        timeout_s=options.timeout_s,
        context_tokens=frontend.context_tokens,
        limits=ReplyLimits(options.stop, options.min_tokens, options.thinking_budget),
        grammar=None if constraint is None else compile_constraint(frontend.grammars, constraint),
        max_tool_calls=max_tool_calls,
    )
