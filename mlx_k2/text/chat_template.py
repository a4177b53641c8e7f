"""A checkpoint's chat template: its source, its rendering under limits on time and size, and its modes of thinking.

Knows no token ids, and no model by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_k2.errors import RequestError, TokenizerError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import read_json
from mlx_k2.text.jinja_template import FILE, TemplateFailure, TemplateNames, TemplateRefusal
from mlx_k2.text.template_process import template_process
from mlx_k2.text.template_worker import TemplateRequest

INSTANT_TEMPERATURE = 0.6
"""The temperature that Moonshot recommends for answers without thinking; no file of a checkpoint contains it."""
_MAX_CPU_S = 5.0
_MAX_CHARACTERS = 64_000_000
_BOM = "\ufeff"
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_INPUTS = ("messages", "tools", "tools_ts_str", "documents", "thinking", "preserve_thinking")
_KNOWN = frozenset((*_INPUTS, *_TOKENS, "add_generation_prompt", "strftime_now"))
"""The variables that a rendering sets, or sets on request."""


class ChatTemplate:
    """A chat template that compiles. A rendering that exceeds ``max_cpu_s`` or ``max_characters`` is stopped.

    It is compiled and rendered in a separate process. ``tokens`` are variables that some templates read: bos_token,
    eos_token, pad_token and unk_token.
    """

    variables: frozenset[str]
    """The variables that the template reads. What a model can do follows from them: ``thinking``, ``tools_ts_str``."""
    fields: frozenset[str]
    """Every name by which the template may read a field of a message."""

    def __init__(
        self,
        source: str,
        *,
        tokens: Mapping[str, str] | None = None,
        max_cpu_s: float = _MAX_CPU_S,
        max_characters: int = _MAX_CHARACTERS,
    ) -> None:
        self.source = source
        self._tokens = dict(tokens or {})
        self._max_cpu_s = max_cpu_s
        self._max_characters = max_characters
        try:
            names = read_json(self._run(None), TemplateNames)
        except JsonError as error:
            raise TokenizerError(f"{FILE}: its process gave no names: {error}") from None
        self.variables, self.fields = names.variables, names.fields

    @property
    def has_reasoning(self) -> bool:
        """Whether the template writes think tokens, as those of K2-Thinking and later models do."""
        return "<think>" in self.source

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for the user if the template reads variables that nothing sets."""
        unknown = ", ".join(sorted(self.variables - _KNOWN))
        return (f"the chat template reads variables that mlx-k2 does not set: {unknown}",) if unknown else ()

    def render(self, variables: Mapping[str, object]) -> str:
        """Return the text that the template renders for ``variables``, which must be picklable.

        Raises:
            RequestError: the template itself refuses these messages.
            TokenizerError: the rendering fails or exceeds a limit; names the line of the template and the problem.
        """
        return self._run(self._tokens | dict(variables))

    def _run(self, variables: Mapping[str, object] | None) -> str:
        request = TemplateRequest(self.source, variables, self._max_cpu_s, self._max_characters)
        try:
            return template_process().render(request)
        except TemplateRefusal as refusal:
            raise RequestError(f"the chat template refuses these messages: {refusal}") from None
        except TemplateFailure as failure:
            raise TokenizerError(str(failure)) from None


@dataclass(frozen=True)
class ThinkingMode:
    """``thinking`` False selects answers without thinking (instant mode); None the template's default.

    ``preserve_thinking`` keeps the reasoning of earlier answers in the prompt.
    """

    thinking: bool | None = None
    preserve_thinking: bool = False

    def variables(self, template: ChatTemplate) -> dict[str, bool]:
        """Return the variables for ``template``.

        Raises:
            RequestError: the template does not read a variable that this mode needs.
        """
        chosen: dict[str, bool] = {}
        if "thinking" in template.variables:
            chosen |= {} if self.thinking is None else {"thinking": self.thinking}
        elif self.thinking is not None and self.thinking != template.has_reasoning:
            ability = "always" if template.has_reasoning else "never"
            raise RequestError(
                f"thinking cannot be turned {'on' if self.thinking else 'off'}: this model {ability} thinks, since its "
                "chat template does not read the variable thinking"
            )
        if self.preserve_thinking and "preserve_thinking" not in template.variables:
            raise RequestError(
                "thinking cannot be preserved on request: the model's chat template does not read the variable "
                "preserve_thinking (leave out --preserve-thinking)"
            )
        return chosen | ({"preserve_thinking": True} if self.preserve_thinking else {})


TEMPLATE_DEFAULT = ThinkingMode()
"""The mode in which the template gets no variable."""


def load_chat_template(files: Mapping[str, bytes]) -> ChatTemplate:
    """Return the template of a checkpoint: chat_template.jinja, else "chat_template" in tokenizer_config.json.

    Raises:
        TokenizerError: the checkpoint has no template, or it cannot be read.
    """
    try:
        config = read_json(files.get("tokenizer_config.json", b"{}"), dict[str, Any])
        source = files[FILE].decode() if FILE in files else config.get("chat_template")
    except (JsonError, UnicodeDecodeError) as error:
        raise TokenizerError(f"the chat template cannot be read: {error}") from None
    if isinstance(source, list):  # several named templates
        by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = by_name.get("default")
    if not isinstance(source, str):
        raise TokenizerError("the model has no chat template: give --raw to send the prompt unchanged")
    tokens = {}
    for name in _TOKENS:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
    return ChatTemplate(source.removeprefix(_BOM), tokens=tokens)
