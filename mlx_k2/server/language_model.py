"""The served model: converts requests of clients to requests of the engine. Knows no HTTP and no stages.

Its methods compute for milliseconds to seconds, and are called on worker threads. Only ``keep_turn``, which is fast, is
called on the event loop.
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
from mlx_k2.server.turn_store import TURN_HANDLE_FIELD, StoredTurn, TurnStore
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
"""A chat request without tools has the priority brief if its answer is limited to at most this number of tokens."""
_MAX_TOKEN_ID_DIGITS = 9
"""Enough for every vocabulary; a longer number is no token id."""
_CALL_ID = re.compile(r"functions\..+:(\d{1,9})")
_NO_PARAMETERS = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Generation:
    """The engine's requests for one answer, one for each choice, and what the formatting of the answer depends on."""

    submissions: tuple[Submission, ...]
    tokenizer: Tokenizer
    in_reasoning: bool = False
    """Whether the prompt ends inside the reasoning."""
    first_call: int = 0
    """The number of the answer's first tool call in the conversation, for its id."""
    tool_names: tuple[str, ...] = ()
    """The tools that the model may call."""
    constrains_calls: bool = False
    """Whether the arguments of each call follow a grammar of JSON."""
    owner: str = ""
    """The name of the client's key."""
    digest: bytes | None = None
    """The turn store's digest of the conversation to answer; None for a raw prompt."""
    warnings: tuple[str, ...] = ()
    """Lines for the client: schemas whose grammar allows more than the schema, and parts of the request left out."""


class LanguageModel:
    """The served model. ``name`` is its name in the APIs.

    With ``tool_grammar`` True, tool calls follow the schemas of their tools also where the client requires no call.
    """

    def __init__(self, frontend: ModelFrontend, name: str, *, tool_grammar: bool = True) -> None:
        self.name = name
        self._tool_grammar = tool_grammar
        self._frontend = frontend
        self.tokenizer = frontend.tokenizer
        self.context_tokens = frontend.context_tokens
        self._turns = TurnStore()
        _ = frontend.template, frontend.grammars  # cached properties: compute them before several threads use them

    def files(self) -> dict[str, Any]:
        """Return the answer of /v1/model-files: the files with which a client renders and tokenizes prompts itself."""
        files = self._frontend.model.files
        return {
            "name": self.name,
            "digest": self._frontend.model.digest,
            "context_tokens": self.context_tokens,
            "files": {name: data for name, data in files.items() if name in (CONFIG_NAME, *TOKENIZER_NAMES)},
        }

    def chat(self, chat: ChatRequest, owner: str) -> Generation:
        """Return the generation for a chat request. ``owner`` is the name of the client's API key.

        Raises:
            ApiError: 400, the request cannot be served; names the field at fault.
            TokenizerError: the chat template fails.
        """
        prompt_ids, digest = self.chat_prompt(chat, owner)
        first_call = next_call_number(chat.messages)
        grammar = self._grammar(chat, first_call)
        budget = chat.thinking_budget if self._frontend.template.has_reasoning else None
        limits = ReplyLimits(chat.stop_strings, chat.min_tokens or 0, thinking_budget=budget)
        requests = self._requests(chat, prompt_ids, self._mode(chat).thinking)
        return Generation(
            tuple(Submission(request, ReplyPolicy(self.tokenizer, request, limits, grammar)) for request in requests),
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
        """Return the prompt's token ids and the turn store's digest of its messages.

        Earlier answers to this owner keep the tokens that were sampled; reasoning that the client left out is restored.

        Raises:
            ApiError: 400, a message is malformed.
            TokenizerError: the chat template fails.
        """
        template = self._frontend.template
        try:
            messages = read_history(chat.messages, template.fields, normal_call_ids=True).messages
            turn_handles = [message.get(TURN_HANDLE_FIELD) for message in chat.messages]
            restored = self._turns.restore(owner, messages, turn_handles)
            variables = self._mode(chat).variables(template)
            pieces = render_pieces(template, self.tokenizer, restored.messages, _declarations(chat), **variables)
        except RequestError as error:
            raise bad_request_error(str(error), "messages") from None
        sampled = SampledTurns(self.tokenizer)
        for number, turn in restored.turns.items():
            sampled.keep(number, turn.token_ids)
        return sampled.encode(pieces), restored.digest

    def keep_turn(self, generation: Generation, turn_handle: str, message: Message, token_ids: Sequence[int]) -> None:
        """Store the answer ``message`` for later prompts, unless it is empty or answers a raw prompt."""
        if generation.digest is not None and (message.content or message.tool_calls):
            turn = StoredTurn(message, array("I", token_ids))
            self._turns.keep(generation.owner, turn_handle, generation.digest, turn)

    def completion(self, completion: CompletionRequest) -> Generation:
        """Return the generation for a raw prompt.

        Raises:
            ApiError: 400, the request cannot be served; names the field at fault.
        """
        prompt = completion.text_or_ids
        prompt_ids = self.tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt
        self._check_ids(prompt_ids, "prompt")
        limits = ReplyLimits(completion.stop_strings, completion.min_tokens or 0)
        requests = self._requests(completion, prompt_ids)
        policies = [ReplyPolicy(self.tokenizer, request, limits, is_raw=True) for request in requests]
        return Generation(tuple(map(Submission, requests, policies)), self.tokenizer)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids; a control token becomes its name.

        Raises:
            ApiError: 400, an id is not in the vocabulary.
        """
        self._check_ids(token_ids, "tokens")
        return b"".join(map(self.tokenizer.token_bytes, token_ids)).decode(errors="replace")

    def _check_ids(self, token_ids: Sequence[int], field: str) -> None:
        size = self.tokenizer.vocab_size
        for token_id in token_ids:
            if not 0 <= token_id < size:
                raise bad_request_error(f"{field}: the vocabulary of {size} tokens has no {token_id}", field)

    def _mode(self, chat: ChatRequest) -> ThinkingMode:
        """Return the requested mode. A mode that the template cannot select is ignored, not refused."""
        variables = self._frontend.template.variables
        return ThinkingMode(
            chat.wants_thinking if "thinking" in variables else None,
            chat.preserves_thinking and "preserve_thinking" in variables,
        )

    def _requests(
        self, fields: GenerationFields, prompt_ids: Sequence[int], thinking: bool | None = None
    ) -> list[Request]:
        """Return the engine's request for each choice, with its own seed."""
        if not prompt_ids:
            raise bad_request_error("the prompt is empty: give some text, or token ids", "prompt")
        if len(prompt_ids) >= self.context_tokens:
            field = "messages" if isinstance(fields, ChatRequest) else "prompt"
            raise context_overflow(len(prompt_ids), self.context_tokens, field)
        max_tokens = min(fields.limit_tokens or self.context_tokens, self.context_tokens - len(prompt_ids))
        stop_ids = frozenset[int]() if fields.ignore_eos else self._frontend.stop_ids
        samplings = sampling_per_answer(self._sampling(fields, thinking), fields.n or 1)
        ids, priority = tuple(prompt_ids), _priority(fields)
        return [Request(ids, max_tokens, sampling, stop_ids, priority=priority) for sampling in samplings]

    def _sampling(self, fields: GenerationFields, thinking: bool | None) -> Sampling:
        values = {name: getattr(fields, name) for name in SAMPLING_NAMES}
        if fields.top_k is not None:  # 0 and -1 mean all tokens, as in other servers
            size = self.tokenizer.vocab_size
            values["top_k"] = size if fields.top_k in (0, -1) else min(fields.top_k, size)
        seed = secrets.randbits(32) if fields.seed is None else fields.seed
        biases, num_logprobs = self._biases(fields), fields.num_logprobs
        try:
            return resolved_sampling(values, self._frontend.recommended, seed, biases, num_logprobs, thinking=thinking)
        except RequestError as error:
            # Other messages begin with the name of the field, as "top-p 2 is out of range".
            name = "logit_bias" if "logit bias" in str(error) else str(error).split(" ", 1)[0].replace("-", "_")
            raise bad_request_error(str(error), name) from None

    def _biases(self, fields: GenerationFields) -> tuple[tuple[int, float], ...]:
        """Return pairs of a token id and its logit bias; as keys of JSON the ids are text."""
        biases: dict[int, float] = {}
        for key, bias in (fields.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) <= _MAX_TOKEN_ID_DIGITS):
                raise bad_request_error(f"logit_bias: {key!r} is not a token id", "logit_bias")
            biases[int(key)] = bias
        self._check_ids(list(biases), "logit_bias")
        return tuple(biases.items())

    def _grammar(self, chat: ChatRequest, first_call: int) -> ReplyGrammar | None:
        """Return the compiled constraint of the answer; None allows every token.

        Raises:
            ApiError: 400, a schema cannot be used, or the chosen tool is not declared.
        """
        answer, declarations = chat.answer_format, [_declaration(tool) for tool in chat.tools or ()]
        if answer is None and not declarations and chat.tool_choice is None:
            return None
        field = "tool_choice"  # the field at fault: first of tool_rules, then of compile_constraint
        try:
            rules = tool_rules(
                declarations,
                chat.tool_choice,
                is_parallel=chat.parallel_tool_calls is not False,
                has_grammar=self._tool_grammar,
                first_number=first_call,
            )
            field = "response_format"
            return compile_constraint(self._frontend.grammars, Constraint(answer, rules))
        except RequestError as error:
            # compile_constraint begins its messages about tools with these words.
            is_tool = str(error).startswith(("the schema of tool ", "tool calls "))
            raise bad_request_error(str(error), "tools" if is_tool else field) from None


def _priority(fields: GenerationFields) -> Priority:
    """Return the priority of a request. Requests for titles and tags are brief: few tokens, no tools."""
    if fields.service_tier == "flex":
        return Priority.BACKGROUND
    limit = fields.limit_tokens
    is_brief = isinstance(fields, ChatRequest) and not fields.tools and limit is not None and limit <= BRIEF_TOKENS
    return Priority.BRIEF if is_brief else Priority.INTERACTIVE


def next_call_number(messages: Sequence[Mapping[str, Any]]) -> int:
    """Return the number for the next tool call's id.

    It is larger than the number of every id in the messages: a model treats a call with an id that occurred before as a
    repetition. A count of the calls is not enough, since the messages may lack the beginning of the conversation.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    ids = [call.get("id") for call in calls] + [message.get("tool_call_id") for message in messages]
    matches = [_CALL_ID.fullmatch(call_id) for call_id in ids if isinstance(call_id, str)]
    return max([len(calls), *(int(match[1]) + 1 for match in matches if match)])


def _declarations(chat: ChatRequest) -> list[dict[str, Any]]:
    """Return the declarations of the tools that the model may call."""
    return [] if chat.tool_choice == "none" else [_declaration(tool) for tool in chat.tools or ()]


def _declaration(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool's declaration; a tool without parameters gets the schema of an empty object."""
    function = tool["function"]
    return {"type": "function", "function": {**function, "parameters": function.get("parameters") or _NO_PARAMETERS}}
