"""The messages of a conversation, and its prompts as token ids. Knows no stages and runs nothing."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mlx_k2.errors import RequestError
from mlx_k2.text.chat_template import TEMPLATE_DEFAULT, ChatTemplate, ThinkingMode
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.message import Message, assistant_message, num_calls, tool_messages
from mlx_k2.text.prompt import PromptPiece, encode_pieces, render_pieces
from mlx_k2.text.reply_parts import Reply
from mlx_k2.text.sampled_turns import SampledTurns
from mlx_k2.text.tokenizer import Tokenizer


class Conversation:
    """Messages, and the sampled tokens of the model's own messages.

    ``tools`` are declarations in OpenAI's format. The model's messages keep their reasoning. The template and the
    mode determine how much of the reasoning a prompt contains: most of Kimi's templates leave out the reasoning before
    the last answer.

    Raises:
        RequestError: the template has no such mode.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, Any]] = (),
        system: str | None = None,
        mode: ThinkingMode = TEMPLATE_DEFAULT,
    ) -> None:
        self._template = template
        self._tokenizer = tokenizer
        self._tools = list(tools)
        self._sampled_turns = SampledTurns(tokenizer)
        self._messages: list[Message] = []
        self._set_mode(mode)
        self.set_system(system)

    @property
    def messages(self) -> list[Message]:
        """All messages, the system prompt included."""
        return list(self._messages)

    @property
    def system(self) -> str | None:
        """The system prompt; None for the template's own."""
        return self._messages[0].content if self._has_system else None

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt; None selects the template's own."""
        if self._has_system:
            del self._messages[0]
        if text is not None:
            self._messages.insert(0, Message(role="system", content=text))

    def set_thinking(self, thinking: bool) -> None:
        """Select whether the next replies begin with thinking.

        Raises:
            RequestError: the template has no such mode; the mode is unchanged.
        """
        self._set_mode(replace(self._mode, thinking=thinking))

    def add_user(self, text: str) -> Message:
        """Add a message of the user and return it."""
        return self._add(Message(role="user", content=text))

    def add_reply(self, reply: Reply, token_ids: Iterable[int]) -> Message:
        """Add a reply with its sampled tokens, which may include the one that ends the turn; return the message."""
        self._sampled_turns.keep(self._num_replies, token_ids)
        return self._add(assistant_message(reply, num_calls(self._messages)))

    def add_results(self, texts: Sequence[str]) -> list[Message]:
        """Add one tool result for each call of the last reply, in the order of the calls; return the messages."""
        return [self._add(message) for message in tool_messages(self._messages[-1], texts)]

    def undo(self) -> str | None:
        """Remove the user's last message and all that follows it; return its text, or None if there is none."""
        if (index := self._last_user_index) is None:
            return None
        text = self._messages[index].content
        self._truncate(index)
        return text

    def remove_reply(self) -> bool:
        """Remove all that follows the user's last message; return False if the user has sent no message."""
        if (index := self._last_user_index) is None:
            return False
        self._truncate(index + 1)
        return True

    def reset(self) -> None:
        """Remove all messages except the system prompt."""
        self._truncate(1 if self._has_system else 0)

    def load(self, messages: Sequence[Mapping[str, object]], context_tokens: int) -> tuple[str, ...]:
        """Replace all messages by ``messages``; return a line for each message of which a field was left out.

        Raises:
            RequestError, TokenizerError: the messages are malformed, cannot be rendered, or do not fit into
                ``context_tokens``; the conversation is unchanged.
        """
        history = read_history(messages, self._template.fields, normal_call_ids=True)
        num_tokens = len(encode_pieces(self._tokenizer, self._render(history.messages)))
        if num_tokens >= context_tokens:
            raise RequestError(
                f"these messages are {num_tokens} tokens, and the context holds {context_tokens}: "
                "give a larger --context, up to that of the model"
            )
        self._sampled_turns.forget_from(0)
        self._messages = history.messages
        return history.left_out

    def prompt_ids(self) -> list[int]:
        """Return the prompt for the next reply.

        Raises:
            RequestError, TokenizerError: the template refuses the messages, or fails.
        """
        return self._sampled_turns.encode(self._render(self._messages))

    def next_prompt_prefix(self) -> list[int]:
        """Return the longest prefix of the next prompt that does not depend on the user's next message.

        Where the template drops reasoning before the last answer, the prefix has none either.
        """
        with_a, with_b = (self._render([*self._messages, Message(role="user", content=text)]) for text in ("a", "b"))
        prefix = []
        for piece, other_piece in zip(with_a, with_b, strict=False):
            if piece != other_piece:
                break
            prefix.append(piece)
        return self._sampled_turns.encode(prefix)

    def _set_mode(self, mode: ThinkingMode) -> None:
        self._variables = mode.variables(self._template)
        self._mode = mode

    @property
    def _has_system(self) -> bool:
        return bool(self._messages) and self._messages[0].role == "system"

    @property
    def _last_user_index(self) -> int | None:
        indices = [index for index, message in enumerate(self._messages) if message.role == "user"]
        return indices[-1] if indices else None

    def _add(self, message: Message) -> Message:
        self._messages.append(message)
        return message

    def _truncate(self, num_messages: int) -> None:
        del self._messages[num_messages:]
        self._sampled_turns.forget_from(self._num_replies)

    def _render(self, messages: Sequence[Message]) -> list[PromptPiece]:
        return render_pieces(self._template, self._tokenizer, messages, self._tools, **self._variables)

    @property
    def _num_replies(self) -> int:
        return sum(message.role == "assistant" for message in self._messages)
