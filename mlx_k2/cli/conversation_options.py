"""The options of a conversation with the model, and the settings that result from them. Shows nothing."""

import msgspec

from mlx_k2.chat.chat_session import ReplySettings
from mlx_k2.chat.conversation import Conversation
from mlx_k2.chat.sampling_options import SamplingOptions, reply_settings
from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.options import ToolOptions
from mlx_k2.errors import RequestError
from mlx_k2.weights.model_frontend import ModelFrontend


class ConversationOptions(msgspec.Struct, frozen=True, kw_only=True):
    """System prompt, sampling and tools. ``system`` None selects the template's own prompt."""

    system: str | None
    sampling: SamplingOptions
    tools: ToolOptions

    def settings(
        self, frontend: ModelFrontend, tools: Tools | None = None, num_logprobs: int | None = None
    ) -> ReplySettings:
        """Return the settings of replies. ``tools`` None, before the tools are started: --tool-choice is not checked.

        Raises:
            RequestError: a schema or a grammar cannot be used, or --tool-choice names no declared tool.
        """
        sampling = self.sampling
        if tools is None and self.tools.has_tools:
            sampling = msgspec.structs.replace(sampling, tool_choice=None)
        return reply_settings(
            sampling,
            frontend,
            () if tools is None else tools.declarations,
            max_tool_calls=self.tools.max_tool_calls,
            num_logprobs=num_logprobs,
        )

    def for_server(self) -> "ConversationOptions":
        """Return the options for the model of a server. A server gets no token masks, so that calls follow no grammar.

        Raises:
            RequestError: an option needs token masks, or counts the tokens of the complete answer.
        """
        sampling = self.sampling
        is_refused = {
            "--json-schema": sampling.json_schema is not None,
            "--regex": sampling.regex is not None,
            "--lark": sampling.lark is not None,
            "--tool-choice": sampling.tool_choice not in (None, "auto"),
            "--parallel-tool-calls off": not sampling.parallel_tool_calls,
            "--min-tokens": sampling.min_tokens > 0,
            "--thinking-budget together with a penalty": sampling.thinking_budget is not None
            and bool(sampling.presence_penalty or sampling.frequency_penalty),
        }
        for name, is_set in is_refused.items():
            if is_set:
                raise RequestError(f"--connect has no {name}: leave it out")
        return msgspec.structs.replace(self, sampling=msgspec.structs.replace(sampling, tool_grammar=False))

    def begin(self, frontend: ModelFrontend, tools: Tools | None) -> Conversation:
        """Return a conversation without messages of the user or the model.

        Raises:
            RequestError, TokenizerError: the model does not have the mode of thinking, or no usable chat template.
        """
        declarations = () if tools is None else tools.declarations
        return Conversation(frontend.template, frontend.tokenizer, declarations, self.system, self.sampling.mode)
