"""The mode in which a model thinks, as variables of its chat template. Knows no model by name."""

from dataclasses import dataclass

from mlx_k2.errors import RequestError
from mlx_k2.text.chat_template import ChatTemplate

INSTANT_TEMPERATURE = 0.6
"""The temperature that Moonshot recommends for answers without thinking; no file of a checkpoint contains it."""


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
