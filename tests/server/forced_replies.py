"""Servers whose model gives a reply that a test has chosen: its tokens are forced at the sampler of the last stage.

Scheduler, slots, cache, engine, token policy and HTTP are the real ones.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from openai import OpenAI

from mlx_k2.protocol.messages import Step
from mlx_k2.sampling import Sampling
from mlx_k2.server.api_keys import KeyRing
from mlx_k2.server.server_state import ServerOptions
from mlx_k2.testing.token_stages import TokenStages
from mlx_k2.text.tokenizer import Tokenizer
from tests.server.client_script import completion_fields
from tests.server.http_client import WAIT_S
from tests.server.in_process import SteppedServer, builtin_frontend, stepped_server
from tests.text.replies import call, reply_ids, section

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "mcp__a-b.c")
]
USER_MESSAGES: list[Any] = [{"role": "user", "content": "a"}]
REQUEST: dict[str, Any] = {"model": "m", "messages": USER_MESSAGES, "tools": TOOLS}
TWO_CALLS = section(
    call("functions.f:0", '{"text": "one two three four five"}'), call("functions.mcp__a-b.c:1", '{"number": 5777}')
)


class ForcedReply(NamedTuple):
    """A reply as the model writes it, and its finish reason in a chat completion."""

    text: str
    finish_reason: str


REPLIES = {
    "text": ForcedReply("<think>Short.</think>The answer is ☃.", "stop"),
    "content alone": ForcedReply("<think></think>Only this.", "stop"),
    "reasoning alone": ForcedReply("<think>Never ended", "stop"),
    "calls": ForcedReply(f"<think>Think first.</think>I call.{TWO_CALLS}", "tool_calls"),
    "calls within the reasoning": ForcedReply(f"<think>Think first.{TWO_CALLS}", "tool_calls"),
    "a call without arguments": ForcedReply(f"<think></think>{section(call('functions.f:0', ''))}", "tool_calls"),
    "broken arguments": ForcedReply("<think></think>" + section(call("functions.f:0", '{"a": ')), "tool_calls"),
    "markers as text": ForcedReply("<think></think>Say `<|tool_calls_section_begin|` and </thin", "stop"),
}
TEXT_REPLY, CALLS_REPLY = REPLIES["text"].text, REPLIES["calls"].text


@dataclass
class ForcedStageMaker:
    """A maker of stages that sample ``token_ids`` after a prompt of ``num_prompt_tokens``, then the end of a turn."""

    token_ids: Sequence[int]
    end_id: int
    num_prompt_tokens: int = 0
    fail_at: int | None = None
    """The last stage fails once, when it samples the token of the reply with this index or a later one.

    The stage samples no tokens that the grammar forces.
    """

    def __call__(self, num_stages: int, on_plan: Callable[[Step], None]) -> TokenStages:
        maker = self

        class Stages(TokenStages):
            def sample(self, token_ids: Sequence[int], sampling: Sampling) -> int:
                index = len(token_ids) - maker.num_prompt_tokens
                if maker.fail_at is not None and index >= maker.fail_at:
                    maker.fail_at = None
                    self.fail(1)
                return maker.token_ids[index] if 0 <= index < len(maker.token_ids) else maker.end_id

        return Stages(num_stages, on_plan)


@dataclass(frozen=True)
class ForcedServer(SteppedServer):
    """A server with running stages whose model gives one reply, and the official client."""

    client: OpenAI
    stage_maker: ForcedStageMaker

    def fail_once(self, index: int, *, restarts: bool) -> None:
        """Let a stage fail once, at token ``index`` of a reply. Without ``restarts`` its restart is cancelled."""
        self.stage_maker.fail_at = index
        if restarts:
            self.harness.may_restart.set()
        else:
            self.harness.cancel()


def builtin_tokenizer() -> Tokenizer:
    """Return the tokenizer of the built-in model."""
    return builtin_frontend().tokenizer


@contextmanager
def forced_server(
    reply: str,
    options: ServerOptions | None = None,
    *,
    drafts: bool = False,
    messages: Sequence[Any] = USER_MESSAGES,
    keys: KeyRing | None = None,
    key: str = "any",
) -> Iterator[ForcedServer]:
    """Yield a server whose model gives ``reply`` after the prompt of ``messages`` and TOOLS. The client has ``key``."""
    tokenizer = builtin_tokenizer()
    maker = ForcedStageMaker(reply_ids(reply, tokenizer), tokenizer.special_ids["<|im_end|>"])
    with (
        stepped_server(options, num_slots=2, chunk_tokens=64, keys=keys, drafts=drafts, make_stages=maker) as server,
        server.running_stages(),
    ):
        client = OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)
        prompt = {"messages": list(messages), "tools": TOOLS}
        maker.num_prompt_tokens = server.request("POST", "/tokenize", prompt, **{"x-api-key": key}).json["count"]
        yield ForcedServer(server.port, server.harness, server.lines, server.state, client, maker)


def prompt_ids(server: SteppedServer, **request: Any) -> list[int]:
    """Return the token ids of the prompt for a chat request."""
    ids: list[int] = server.request("POST", "/tokenize", request).json["tokens"]
    return ids


def reply_fields(client: OpenAI, **fields: Any) -> dict[str, Any]:
    """Return the fields of the reply to REQUEST with ``fields`` changed."""
    return completion_fields(client.chat.completions.create(**REQUEST | fields))


def streamed_reply_fields(client: OpenAI, **fields: Any) -> dict[str, Any]:
    """Return what ``reply_fields`` returns, from a stream whose parts the client's own accumulator joins."""
    with client.chat.completions.stream(**REQUEST | fields) as stream:
        return completion_fields(stream.get_final_completion())
