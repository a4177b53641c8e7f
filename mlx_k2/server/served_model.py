"""The model that is served: from a chat request to the engine's request. Knows no HTTP and no stages.

Everything here computes for milliseconds to seconds, and runs on worker threads, never on the event loop.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_k2.coordinator.reply_policy import ReplyLimits, ReplyPolicy
from mlx_k2.errors import RequestError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Request
from mlx_k2.server.api_errors import context_overflow, invalid
from mlx_k2.server.chat_request import ChatRequest
from mlx_k2.text.history import num_calls, with_normal_ids
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.prompt import opens_reasoning, render_prompt
from mlx_k2.text.thinking_mode import INSTANT_TEMPERATURE, ThinkingMode
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.weights.model_frontend import ModelFrontend

SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_NUMBERED_ID = re.compile(r"functions\..+:(\d{1,9})")
_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Generation:
    """One request for the engine, and what its answer's reader needs to know."""

    request: Request
    policy: ReplyPolicy
    tokenizer: Tokenizer
    in_reasoning: bool
    """Whether the answer begins inside the reasoning."""
    first_call: int
    """The number of the answer's first tool call, for its id."""
    tool_names: tuple[str, ...]
    """The declared tools."""


class ServedModel:
    """A model under the name that clients see."""

    def __init__(self, frontend: ModelFrontend, name: str) -> None:
        self.name = name
        self._frontend = frontend
        self.tokenizer = frontend.tokenizer
        self.context_tokens = frontend.context_tokens
        _ = frontend.template  # compiled before the first request

    def chat(self, chat: ChatRequest) -> Generation:
        """Return the generation for a chat request.

        Raises:
            ApiError: 400, the request cannot be served; names the field.
            TokenizerError: the template fails.
        """
        thinking = self._mode(chat)
        tools = [] if chat.tool_choice == "none" else [_declaration(tool) for tool in chat.tools or ()]
        try:
            messages = with_normal_ids(read_history(chat.messages, self._frontend.template.fields).messages)
            prompt_ids = render_prompt(
                self._frontend.template,
                self.tokenizer,
                messages,
                tools,
                **thinking.variables(self._frontend.template),
            )
        except RequestError as error:
            raise invalid(str(error), "messages") from None
        banned = self._call_ids() if chat.tool_choice == "none" and chat.tools else frozenset[int]()
        limits = ReplyLimits(
            stop_strings=chat.stop_strings,
            thinking_budget=chat.thinking_budget,
            max_tool_calls=1 if chat.parallel_tool_calls is False else None,
            banned_ids=banned,
        )
        request = self._request(chat, prompt_ids, self._sampling(chat, thinking.thinking))
        return Generation(
            request,
            ReplyPolicy(self.tokenizer, request, limits),
            self.tokenizer,
            in_reasoning=opens_reasoning(self.tokenizer, prompt_ids),
            first_call=next_call_number(chat.messages),
            tool_names=tuple(tool["function"]["name"] for tool in tools),
        )

    def _mode(self, chat: ChatRequest) -> ThinkingMode:
        """Return the mode that is asked for, as far as the template has it: thinking is never refused."""
        known = self._frontend.template.variables
        return ThinkingMode(
            chat.wants_thinking if "thinking" in known else None,
            chat.preserves_thinking and "preserve_thinking" in known,
        )

    def _request(self, chat: ChatRequest, prompt_ids: Sequence[int], sampling: Sampling) -> Request:
        if len(prompt_ids) >= self.context_tokens:
            raise context_overflow(len(prompt_ids), self.context_tokens)
        max_tokens = min(chat.limit_tokens or self.context_tokens, self.context_tokens - len(prompt_ids))
        return Request(tuple(prompt_ids), max_tokens, sampling, self._frontend.stop_ids)

    def _sampling(self, chat: ChatRequest, thinking: bool | None) -> Sampling:
        recommended = self._frontend.recommended
        values: dict[str, Any] = {name: getattr(chat, name) for name in SAMPLING_FIELDS}
        if values["temperature"] is None and thinking is False:
            values["temperature"] = INSTANT_TEMPERATURE
        for name in SAMPLING_FIELDS:
            values[name] = getattr(recommended, name) if values[name] is None else values[name]
        given = {name: value for name, value in values.items() if value is not None}
        seed = secrets.randbits(32) if chat.seed is None else chat.seed
        num_logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
        try:
            return Sampling(seed=seed, num_logprobs=num_logprobs, **given)
        except RequestError as error:
            raise invalid(str(error), str(error).split(" ", 1)[0].replace("-", "_")) from None

    def _call_ids(self) -> frozenset[int]:
        """Return the control tokens that begin a tool call."""
        names = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
        return frozenset(self.tokenizer.special_ids[name] for name in names if name in self.tokenizer.special_ids)


def next_call_number(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number for the next tool call's id.

    It is above all numbers that occur, also where the client has cut off the beginning of the conversation: a model
    would take a call with an id that it has seen for a repetition.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    ids = [call.get("id") for call in calls] + [message.get("tool_call_id") for message in messages]
    found = [_NUMBERED_ID.fullmatch(written) for written in ids if isinstance(written, str)]
    return max([num_calls(messages), *(int(match[1]) + 1 for match in found if match)])


def _declaration(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool's declaration with parameters, which a client may leave out."""
    function = tool["function"]
    return {"type": "function", "function": {**function, "parameters": function.get("parameters") or _NO_PARAMETERS}}
