"""The options of a conversation with the model, and what they select. Shows nothing."""

import msgspec

from mlx_k2.chat.chat_session import ReplySettings
from mlx_k2.chat.conversation import Conversation
from mlx_k2.chat.sampling_options import SamplingOptions, reply_settings
from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.options import ToolOptions
from mlx_k2.weights.model_frontend import ModelFrontend


class ConversationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """System prompt, sampling and tools. ``system`` None: the template's own."""

    system: str | None
    sampling: SamplingOptions
    tools: ToolOptions

    def settings(
        self, frontend: ModelFrontend, tools: Tools | None = None, num_logprobs: int | None = None
    ) -> ReplySettings:
        """Return the settings of replies. Without ``tools`` the choice of a tool is not checked yet.

        Raises:
            RequestError: a schema or a grammar cannot be used, or the chosen tool is not declared.
        """
        sampling = self.sampling
        if tools is None and self.tools.is_given:
            sampling = msgspec.structs.replace(sampling, tool_choice=None)
        return reply_settings(
            sampling,
            frontend,
            () if tools is None else tools.declarations,
            max_tool_calls=self.tools.max_tool_calls,
            num_logprobs=num_logprobs,
        )

    def begin(self, frontend: ModelFrontend, tools: Tools | None) -> Conversation:
        """Return a conversation without messages of the user or the model.

        Raises:
            RequestError, TokenizerError: the model cannot think as the options demand, or has no usable chat template.
        """
        declared = () if tools is None else tools.declarations
        return Conversation(frontend.template, frontend.tokenizer, declared, self.system, self.sampling.mode)
