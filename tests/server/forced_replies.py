"""Servers whose model gives a reply that a test chooses: the sampler of the last stage returns its tokens.

Scheduler, slots, cache, engine, token policy and HTTP are the real ones.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from openai import OpenAI

from mlx_k2.protocol.messages import Step
from mlx_k2.sampling import Sampling
from mlx_k2.server.api_keys import KeyRing
from mlx_k2.server.server_state import ServerOptions
from mlx_k2.testing.token_stages import TokenStages
from mlx_k2.text.tokenizer import Tokenizer
from tests.server.in_process import SteppedServer, builtin_frontend, stepped_server
from tests.server.server_process import WAIT_S
from tests.text.replies import call, section, tokens_of

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "mcp__a-b.c")
]
USER: list[Any] = [{"role": "user", "content": "a"}]
TWO_CALLS = section(
    call("functions.f:0", '{"text": "one two three four five"}'), call("functions.mcp__a-b.c:1", '{"number": 5777}')
)
REPLIES = {
    "text": ("<think>Short.</think>The answer is ☃.", "stop"),
    "content alone": ("<think></think>Only this.", "stop"),
    "reasoning alone": ("<think>Never ended", "stop"),
    "calls": (f"<think>Think first.</think>I call.{TWO_CALLS}", "tool_calls"),
    "calls within the reasoning": (f"<think>Think first.{TWO_CALLS}", "tool_calls"),
    "a call without arguments": (f"<think></think>{section(call('functions.f:0', ''))}", "tool_calls"),
    "broken arguments": ("<think></think>" + section(call("functions.f:0", '{"a": ')), "tool_calls"),
    "markers as text": ("<think></think>Say `<|tool_calls_section_begin|` and </thin", "stop"),
}


@dataclass
class ForcedStages:
    """A factory of stages that sample ``token_ids`` after a prompt of ``num_prompt`` tokens, then ``end_id``."""

    token_ids: Sequence[int]
    end_id: int
    num_prompt: int = 0
    fail_at: int | None = None
    """The index in the reply at which a stage fails once, or at the next token that the grammar does not force."""

    def __call__(self, num_stages: int, on_plan: Callable[[Step], None]) -> TokenStages:
        factory = self

        class Stages(TokenStages):
            def sample(self, token_ids: Sequence[int], sampling: Sampling) -> int:
                index = len(token_ids) - factory.num_prompt
                if factory.fail_at is not None and index >= factory.fail_at:
                    factory.fail_at = None
                    self.fail(1)
                return factory.token_ids[index] if 0 <= index < len(factory.token_ids) else factory.end_id

        return Stages(num_stages, on_plan)


def builtin_tokenizer() -> Tokenizer:
    """Return the tokenizer of the built-in model."""
    return builtin_frontend().tokenizer


@contextmanager
def forced_server(
    reply: str,
    options: ServerOptions | None = None,
    *,
    drafts: bool = False,
    messages: Sequence[Any] = USER,
    keys: KeyRing | None = None,
    key: str = "any",
) -> Iterator[tuple[SteppedServer, OpenAI, ForcedStages]]:
    """Yield a server whose model answers ``reply`` to ``messages``, the official client, and the stages."""
    tokenizer = builtin_tokenizer()
    ids: list[int] = []
    for piece, is_control in tokens_of(reply):
        ids += [tokenizer.special_ids[piece]] if is_control else tokenizer.encode_text(piece)
    stages = ForcedStages(ids, tokenizer.special_ids["<|im_end|>"])
    with stepped_server(options, num_slots=2, chunk_tokens=64, keys=keys, drafts=drafts, make_stages=stages) as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)
        request = {"messages": list(messages), "tools": TOOLS}
        stages.num_prompt = server.request("POST", "/tokenize", request, **{"x-api-key": key}).json["count"]
        yield server, client, stages


def prompt_of(server: SteppedServer, **request: Any) -> list[int]:
    """Return the token ids of the prompt for a chat request."""
    tokens: list[int] = server.request("POST", "/tokenize", request).json["tokens"]
    return tokens


def accumulate(client: OpenAI, **fields: Any) -> dict[str, Any]:
    """Return the compared fields of the completion that the client accumulates from a stream."""
    with client.chat.completions.stream(model="m", messages=USER, tools=TOOLS, **fields) as stream:
        return fields_of(stream.get_final_completion().to_dict())


def body_of(client: OpenAI, **fields: Any) -> dict[str, Any]:
    """Return the compared fields of a completion that is not streamed."""
    return fields_of(client.chat.completions.create(model="m", messages=USER, tools=TOOLS, **fields).to_dict())


def fields_of(body: dict[str, Any]) -> dict[str, Any]:
    (choice,) = body["choices"]
    message = choice["message"]
    return {
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning_content") or "",
        "calls": [
            (tool_call["id"], tool_call["function"]["name"], tool_call["function"]["arguments"])
            for tool_call in message.get("tool_calls") or ()
        ],
        "finish_reason": choice["finish_reason"],
    }
