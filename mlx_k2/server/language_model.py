"""The model that is served: from a chat request to the engine's request. Knows no HTTP and no stages.

Everything here computes for milliseconds to seconds, and runs on worker threads, never on the event loop.
"""

import re
import secrets
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_k2.chat.sampling_options import SAMPLING_NAMES, resolved_sampling
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.reply_policy import ReplyLimits, ReplyPolicy
from mlx_k2.errors import RequestError
from mlx_k2.sampling import Sampling, sampling_per_answer
from mlx_k2.scheduling.request import Priority, Request
from mlx_k2.server.api_errors import bad_request_error, context_overflow
from mlx_k2.server.chat_request import ChatRequest, CompletionRequest
from mlx_k2.server.request_fields import GenerationFields
from mlx_k2.server.turn_store import HANDLE_FIELD, StoredTurn, TurnStore
from mlx_k2.text.chat_template import ThinkingMode
from mlx_k2.text.constraint import Constraint, tool_rules
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.message import Message
from mlx_k2.text.prompt import opens_reasoning, render_pieces
from mlx_k2.text.reply_grammar import ReplyGrammar, compile_constraint
from mlx_k2.text.sampled_turns import SampledTurns
from mlx_k2.text.tokenizer import Tokenizer
from mlx_k2.weights.checkpoint import TOKENIZER_NAMES
from mlx_k2.weights.index import CONFIG_NAME
from mlx_k2.weights.model_frontend import ModelFrontend

BRIEF_TOKENS = 1024
"""A chat without tools whose answer is limited to this number of tokens is a brief request."""
_MAX_DIGITS = 10
_NUMBERED_ID = re.compile(r"functions\..+:(\d{1,9})")
_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Generation:
    """A request for the engine for each choice of an answer, and what the answer's reader needs to know."""

    submissions: tuple[Submission, ...]
    tokenizer: Tokenizer
    in_reasoning: bool = False
    """Whether the answer begins inside the reasoning."""
    first_call: int = 0
    """The number of the answer's first tool call, for its id."""
    tool_names: tuple[str, ...] = ()
    """The declared tools."""
    constrains_calls: bool = False
    """Whether the arguments of each call follow a grammar of JSON."""
    owner: str = ""
    """The name of the client's key."""
    digest: bytes | None = None
    """The digest of the conversation that is answered, for the turn store; None for a raw prompt."""
    warnings: tuple[str, ...] = ()
    """Lines about schemas of which the answer's grammar allows more."""


class LanguageModel:
    """A model under the name that clients see.

    ``tool_grammar``: whether calls that the model makes by its own choice follow the schemas of the tools.
    """

    def __init__(self, frontend: ModelFrontend, name: str, *, tool_grammar: bool = True) -> None:
        self.name = name
        self._tool_grammar = tool_grammar
        self._frontend = frontend
        self.tokenizer = frontend.tokenizer
        self.context_tokens = frontend.context_tokens
        self._turns = TurnStore()
        _ = frontend.template, frontend.grammars  # made before several threads need them

    def files(self) -> dict[str, Any]:
        """Return what a client needs to render and tokenize for itself: the model's small files, as base64."""
        files = self._frontend.model.files
        return {
            "name": self.name,
            "digest": self._frontend.model.digest,
            "context_tokens": self.context_tokens,
            "files": {name: data for name, data in files.items() if name in (CONFIG_NAME, *TOKENIZER_NAMES)},
        }

    def chat(self, chat: ChatRequest, owner: str) -> Generation:
        """Return the generation for a chat request. ``owner`` is the name of the client's key.

        Raises:
            ApiError: 400, the request cannot be served; names the field.
            TokenizerError: the template fails.
        """
        prompt_ids, digest = self.chat_prompt(chat, owner)
        first_call = next_call_number(chat.messages)
        grammar = self._grammar(chat, first_call)
        budget = chat.thinking_budget if self._frontend.template.has_reasoning else None
        limits = ReplyLimits(chat.stop_strings, chat.min_tokens or 0, budget)
        requests = self._requests(chat, prompt_ids, self._mode(chat).thinking)
        return Generation(
            tuple(Submission(one, ReplyPolicy(self.tokenizer, one, limits, grammar)) for one in requests),
            self.tokenizer,
            in_reasoning=opens_reasoning(self.tokenizer, prompt_ids),
            first_call=first_call,
            tool_names=tuple(tool["function"]["name"] for tool in _declarations(chat)),
            constrains_calls=self._tool_grammar,
            owner=owner,
            digest=digest,
            warnings=() if grammar is None else grammar.warnings,
        )

    def chat_prompt(self, chat: ChatRequest, owner: str) -> tuple[list[int], bytes]:
        """Return the prompt of a chat request and the digest of its messages; errors are those of ``chat``.

        The owner's earlier answers keep the tokens that were sampled, and get back reasoning that the client left out.
        """
        template = self._frontend.template
        try:
            messages = read_history(chat.messages, template.fields, normal_ids=True).messages
            handles = [message.get(HANDLE_FIELD) for message in chat.messages]
            restored = self._turns.restore(owner, messages, handles)
            variables = self._mode(chat).variables(template)
            pieces = render_pieces(template, self.tokenizer, restored.messages, _declarations(chat), **variables)
        except RequestError as error:
            raise bad_request_error(str(error), "messages") from None
        sampled = SampledTurns(self.tokenizer)
        for number, turn in restored.turns.items():
            sampled.keep(number, turn.token_ids)
        return sampled.encode(pieces), restored.digest

    def keep_turn(self, generation: Generation, handle: str, message: Message, token_ids: Sequence[int]) -> None:
        """Store the answer ``message``, for a client that continues its conversation."""
        if generation.digest is not None and (message.content or message.tool_calls):
            turn = StoredTurn(message, array("I", token_ids))
            self._turns.keep(generation.owner, handle, generation.digest, turn)

    def completion(self, completion: CompletionRequest) -> Generation:
        """Return the generation for a raw prompt. Errors are those of ``chat``."""
        prompt = completion.text_or_ids
        prompt_ids = self.tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt
        self._check_ids(prompt_ids, "prompt")
        limits = ReplyLimits(completion.stop_strings, completion.min_tokens or 0)
        requests = self._requests(completion, prompt_ids)
        policies = [ReplyPolicy(self.tokenizer, one, limits, is_raw=True) for one in requests]
        return Generation(tuple(map(Submission, requests, policies)), self.tokenizer)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, control tokens by their names.

        Raises:
            ApiError: 400, an id is not in the vocabulary.
        """
        self._check_ids(token_ids, "tokens")
        return b"".join(map(self.tokenizer.token_bytes, token_ids)).decode(errors="replace")

    def _check_ids(self, token_ids: Sequence[int], field: str) -> None:
        wrong = next((number for number in token_ids if not 0 <= number < self.tokenizer.vocab_size), None)
        if wrong is not None:
            raise bad_request_error(
                f"{field}: the vocabulary of {self.tokenizer.vocab_size} tokens has no {wrong}", field
            )

    def _mode(self, chat: ChatRequest) -> ThinkingMode:
        """Return the mode that is asked for, as far as the template has it: thinking is never refused."""
        known = self._frontend.template.variables
        return ThinkingMode(
            chat.wants_thinking if "thinking" in known else None,
            chat.preserves_thinking and "preserve_thinking" in known,
        )

    def _requests(
        self, asked: GenerationFields, prompt_ids: Sequence[int], thinking: bool | None = None
    ) -> list[Request]:
        """Return the request for each choice, with its own seed."""
        if not prompt_ids:
            raise bad_request_error("the prompt is empty: give some text, or token ids", "prompt")
        if len(prompt_ids) >= self.context_tokens:
            field = "messages" if isinstance(asked, ChatRequest) else "prompt"
            raise context_overflow(len(prompt_ids), self.context_tokens, field)
        max_tokens = min(asked.limit_tokens or self.context_tokens, self.context_tokens - len(prompt_ids))
        stop_ids = frozenset[int]() if asked.ignore_eos else self._frontend.stop_ids
        samplings, ids = sampling_per_answer(self._sampling(asked, thinking), asked.n or 1), tuple(prompt_ids)
        priority = _priority(asked)
        return [Request(ids, max_tokens, sampling, stop_ids, priority=priority) for sampling in samplings]

    def _sampling(self, asked: GenerationFields, thinking: bool | None) -> Sampling:
        given = {name: getattr(asked, name) for name in SAMPLING_NAMES}
        if asked.top_k is not None:  # elsewhere, 0 and -1 set no limit
            size = self.tokenizer.vocab_size
            given["top_k"] = size if asked.top_k in (0, -1) else min(asked.top_k, size)
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        biases, num_logprobs = self._biases(asked), asked.num_logprobs
        try:
            return resolved_sampling(given, self._frontend.recommended, seed, biases, num_logprobs, thinking=thinking)
        except RequestError as error:
            name = str(error).removeprefix("the ").replace("logit bias", "logit-bias").split(" ", 1)[0]
            raise bad_request_error(str(error), name.replace("-", "_")) from None

    def _biases(self, asked: GenerationFields) -> tuple[tuple[int, float], ...]:
        """Return the logit biases by token id; the keys of a JSON object are texts."""
        biases = asked.logit_bias or {}
        wrong = next((key for key in biases if not (key.isascii() and key.isdigit() and len(key) < _MAX_DIGITS)), None)
        if wrong is not None:
            raise bad_request_error(f"logit_bias: {wrong!r} is not a token id", "logit_bias")
        self._check_ids([int(key) for key in biases], "logit_bias")
        return tuple((int(key), bias) for key, bias in biases.items())

    def _grammar(self, chat: ChatRequest, first_call: int) -> ReplyGrammar | None:
        """Return the constraint of the answer; None allows every token.

        Raises:
            ApiError: 400, a schema cannot be used, or the chosen tool is not declared.
        """
        answer, declared = chat.answer_format, [_declaration(tool) for tool in chat.tools or ()]
        if answer is None and not declared and chat.tool_choice is None:
            return None
        field = "tool_choice"
        try:
            rules = tool_rules(
                declared,
                chat.tool_choice,
                is_parallel=chat.parallel_tool_calls is not False,
                has_grammar=self._tool_grammar,
                first_number=first_call,
            )
            field = "response_format"
            return compile_constraint(self._frontend.grammars, Constraint(answer, rules))
        except RequestError as error:
            is_tool = str(error).startswith(("the schema of tool ", "tool calls "))
            raise bad_request_error(str(error), "tools" if is_tool else field) from None


def _priority(asked: GenerationFields) -> Priority:
    """Return the priority of a request. Titles and tags are asked for with few tokens and without tools."""
    if asked.service_tier == "flex":
        return Priority.BACKGROUND
    limit = asked.limit_tokens
    is_brief = isinstance(asked, ChatRequest) and not asked.tools and limit is not None and limit <= BRIEF_TOKENS
    return Priority.BRIEF if is_brief else Priority.INTERACTIVE


def next_call_number(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number for the next tool call's id.

    It is above all numbers that occur, also where the client has cut off the beginning of the conversation: a model
    would take a call with an id that it has seen for a repetition.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    ids = [call.get("id") for call in calls] + [message.get("tool_call_id") for message in messages]
    found = [_NUMBERED_ID.fullmatch(written) for written in ids if isinstance(written, str)]
    return max([len(calls), *(int(match[1]) + 1 for match in found if match)])


def _declarations(chat: ChatRequest) -> list[dict[str, Any]]:
    """Return the declarations of the tools that the model may call."""
    return [] if chat.tool_choice == "none" else [_declaration(tool) for tool in chat.tools or ()]


def _declaration(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool's declaration with parameters, which a client may leave out."""
    function = tool["function"]
    return {"type": "function", "function": {**function, "parameters": function.get("parameters") or _NO_PARAMETERS}}
