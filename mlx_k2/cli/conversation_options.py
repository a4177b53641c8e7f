"""The options of a conversation with the model, and what they select. Shows nothing."""

from collections.abc import Mapping, Sequence

import msgspec

from mlx_k2.chat.chat_session import ReplySettings
from mlx_k2.chat.conversation import Conversation
from mlx_k2.chat.sampling_options import SamplingOptions, reply_settings
from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.console import log
from mlx_k2.cli.options import ToolOptions
from mlx_k2.coordinator.reply_policy import Grammar
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
        grammar = compiled_grammar(sampling, frontend, () if tools is None else tools.declarations)
        max_tool_calls = self.tools.max_tool_calls
        return reply_settings(
            self.sampling, frontend, max_tool_calls=max_tool_calls, num_logprobs=num_logprobs, grammar=grammar
        )

    def begin(self, frontend: ModelFrontend, tools: Tools | None) -> Conversation:
        """Return a conversation without messages of the user or the model.

        Raises:
            RequestError, TokenizerError: the model cannot think as the options demand, or has no usable chat template.
        """
        declared = () if tools is None else tools.declarations
        return Conversation(frontend.template, frontend.tokenizer, declared, self.system, self.sampling.mode)


def compiled_grammar(
    sampling: SamplingOptions, frontend: ModelFrontend, declarations: Sequence[Mapping[str, object]]
) -> Grammar | None:
    """Return the compiled constraint of replies that may call the tools of ``declarations``; None if all is allowed.

    Raises:
        RequestError: a schema or a grammar cannot be used, or the chosen tool is not declared.
    """
    constraint = sampling.constraint(declarations)
    if constraint is None:
        return None
    from mlx_k2.text.grammar import GrammarCompiler
    from mlx_k2.text.reply_grammar import compile_constraint

    grammar = compile_constraint(GrammarCompiler(frontend.tokenizer), frontend.tokenizer, constraint)
    for line in grammar.warnings:
        log(line)
    return grammar
