"""A checkpoint's chat template: its source, its rendering under limits on time and size, and its thinking modes.

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
"""The temperature that Moonshot recommends for instant replies; no file of a checkpoint has it."""
_MAX_CPU_S = 5.0
_MAX_CHARACTERS = 64_000_000
_BOM = "\ufeff"
_TOKEN_VARIABLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_INPUT_VARIABLES = ("messages", "tools", "tools_ts_str", "documents", "thinking", "preserve_thinking")
_KNOWN_VARIABLES = frozenset((*_INPUT_VARIABLES, *_TOKEN_VARIABLES, "add_generation_prompt", "strftime_now"))
"""The variables that this program can set."""


class ChatTemplate:
    """A chat template, compiled and rendered in a separate process.

    A rendering that exceeds ``max_cpu_s`` of CPU time or ``max_characters`` of text is stopped. ``tokens`` are values
    of the variables bos_token, eos_token, pad_token and unk_token, which some templates read.

    Raises:
        TokenizerError: the template cannot be compiled; names the line and the problem.
    """

    variables: frozenset[str]
    """The variables that the template reads. They show what the model supports, such as ``thinking``."""
    fields: frozenset[str]
    """The names of all fields of a message that the template may read."""

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
            raise TokenizerError(f"{FILE}: its process returned no names: {error}") from None
        self.variables, self.fields = names.variables, names.fields

    @property
    def has_reasoning(self) -> bool:
        """True if the template writes think tokens, as the templates of K2-Thinking and later models do."""
        return "<think>" in self.source

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for the user if the template reads variables that this program does not set; else ()."""
        unknown = ", ".join(sorted(self.variables - _KNOWN_VARIABLES))
        return (f"the chat template reads variables that mlx-k2 does not set: {unknown}",) if unknown else ()

    def render(self, variables: Mapping[str, object]) -> str:
        """Return the text that the template renders for ``variables``, which must be picklable.

        Raises:
            RequestError: the template refuses these messages with raise_exception.
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
    """The thinking mode of a prompt.

    ``thinking`` True selects thinking, False instant replies, None the template's default. ``preserve_thinking`` keeps
    the reasoning of earlier answers in the prompt.
    """

    thinking: bool | None = None
    preserve_thinking: bool = False

    def variables(self, template: ChatTemplate) -> dict[str, bool]:
        """Return the template's variables that select this mode.

        Raises:
            RequestError: the template does not read the variable that this mode needs.
        """
        variables: dict[str, bool] = {}
        if "thinking" in template.variables:
            if self.thinking is not None:
                variables["thinking"] = self.thinking
        elif self.thinking is not None and self.thinking != template.has_reasoning:
            ability = "always" if template.has_reasoning else "never"
            raise RequestError(
                f"thinking cannot be turned {'on' if self.thinking else 'off'}: this model {ability} thinks, since its "
                "chat template does not read the variable thinking"
            )
        if not self.preserve_thinking:
            return variables
        if "preserve_thinking" not in template.variables:
            raise RequestError(
                "thinking cannot be preserved on request: the model's chat template does not read the variable "
                "preserve_thinking (leave out --preserve-thinking)"
            )
        return variables | {"preserve_thinking": True}


TEMPLATE_DEFAULT = ThinkingMode()
"""The mode in which the template gets neither ``thinking`` nor ``preserve_thinking``."""


def load_chat_template(files: Mapping[str, bytes]) -> ChatTemplate:
    """Return the template of a checkpoint: chat_template.jinja, else "chat_template" in tokenizer_config.json.

    Raises:
        TokenizerError: the checkpoint has no template, or the template cannot be read or compiled.
    """
    try:
        config = read_json(files.get("tokenizer_config.json", b"{}"), dict[str, Any])
        source = files[FILE].decode() if FILE in files else config.get("chat_template")
    except (JsonError, UnicodeDecodeError) as error:
        raise TokenizerError(f"the chat template cannot be read: {error}") from None
    if isinstance(source, list):  # several named templates
        templates = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = templates.get("default")
    if not isinstance(source, str):
        raise TokenizerError("the model has no chat template: give --raw to send the prompt unchanged")
    tokens = {}
    for name in _TOKEN_VARIABLES:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
    return ChatTemplate(source.removeprefix(_BOM), tokens=tokens)
