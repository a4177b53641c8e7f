"""The options of a reply as a user sets them, and its settings with the recommendations of a checkpoint."""

import secrets
from typing import Annotated

import msgspec

from mlx_k2.chat.chat_session import MAX_TOOL_CALLS, ReplySettings
from mlx_k2.coordinator.reply_policy import ReplyLimits
from mlx_k2.errors import RequestError
from mlx_k2.sampling import GenerationConfig, Sampling
from mlx_k2.text.thinking_mode import INSTANT_TEMPERATURE, ThinkingMode
from mlx_k2.weights.model_frontend import ModelFrontend

_VALUES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_UNSET = GenerationConfig()


class SamplingOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a reply is sampled, how long it may be and whether the model thinks.

    None selects the checkpoint's recommendation, else the value that changes nothing; for ``seed`` a random one, for
    ``max_tokens`` what fits into the context.

    Raises:
        RequestError: a value is out of range.
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
    """The reply ends after this time, counted from the start of its prefill, with what it has."""
    thinking: bool | None = None
    preserve_thinking: bool | None = None
    """Whether the reasoning of earlier replies stays in the prompt."""
    thinking_budget: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """The reasoning is closed after this number of its tokens."""
    stop: tuple[str, ...] = ()
    """The reply ends before the first of these texts in its answer."""

    def __post_init__(self) -> None:
        """Check every value, before anything is loaded."""
        try:
            self.resolved(_UNSET)
        except TypeError as error:
            raise RequestError(f"a sampling value has the wrong type: {error}") from None
        if isinstance(self.stop, str):
            raise RequestError(f"stop is a text: give a tuple of texts, as in ({self.stop!r},)")
        ReplyLimits(self.stop)
        if self.timeout_s is not None and not self.timeout_s > 0:  # also rejects NaN
            raise RequestError(f"timeout is {self.timeout_s:g} s: give more than 0")

    @property
    def mode(self) -> ThinkingMode:
        """The mode in which the model thinks."""
        return ThinkingMode(self.thinking, bool(self.preserve_thinking))

    @property
    def is_for_replies(self) -> bool:
        """Whether an option is set that a raw prompt does not have."""
        return self.thinking is not None or bool(self.preserve_thinking) or self.thinking_budget is not None

    def resolved(self, recommended: GenerationConfig, num_logprobs: int | None = None) -> Sampling:
        """Return the sampler's parameters."""
        values = {
            name: getattr(recommended, name) if getattr(self, name) is None else getattr(self, name) for name in _VALUES
        }
        if self.temperature is None and self.thinking is False:
            values["temperature"] = INSTANT_TEMPERATURE
        given = {name: value for name, value in values.items() if value is not None}
        return Sampling(seed=self.base_seed, num_logprobs=num_logprobs, **given)

    @property
    def base_seed(self) -> int:
        """The seed, else a random one of 32 bits."""
        return secrets.randbits(32) if self.seed is None else self.seed

    def overridden_by(self, other: "SamplingOptions") -> "SamplingOptions":
        """Return these options, with the values of ``other`` that are set."""
        defaults = SamplingOptions()
        given = {
            name: getattr(other, name)
            for name in SamplingOptions.__struct_fields__
            if getattr(other, name) != getattr(defaults, name)
        }
        return msgspec.structs.replace(self, **given)


def reply_settings(
    options: SamplingOptions,
    frontend: ModelFrontend,
    *,
    max_tool_calls: int = MAX_TOOL_CALLS,
    num_logprobs: int | None = None,
) -> ReplySettings:
    """Return the settings of replies of a model: the options, else the checkpoint's recommendations."""
    return ReplySettings(
        sampling=options.resolved(frontend.recommended, num_logprobs),
        max_tokens=frontend.context_tokens if options.max_tokens is None else options.max_tokens,
        stop_ids=frontend.stop_ids,
        timeout_s=options.timeout_s,
        context_tokens=frontend.context_tokens,
        limits=ReplyLimits(stop_strings=options.stop, thinking_budget=options.thinking_budget),
        max_tool_calls=max_tool_calls,
    )
