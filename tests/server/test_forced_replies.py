"""Tests of replies of every kind, whose tokens are forced at the sampler: through scheduler, slots, engine and HTTP."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from openai import APIError, OpenAI

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.protocol.messages import Step
from mlx_k2.sampling import Sampling
from mlx_k2.testing.token_stages import TokenStages
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_source import BUILTIN, ModelSource
from tests.server.in_process import SteppedServer, stepped_server, stepping
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
    "text": ("Short.</think>The answer is ☃.", "stop"),
    "content alone": ("</think>Only this.", "stop"),
    "reasoning alone": ("Never ended", "stop"),
    "calls": (f"Think first.</think>I call.{TWO_CALLS}", "tool_calls"),
    "calls within the reasoning": (f"Think first.{TWO_CALLS}", "tool_calls"),
    "a call without arguments": (f"</think>{section(call('functions.f:0', ''))}", "tool_calls"),
    "broken arguments": ("</think>" + section(call("functions.f:0", '{"a": ')), "tool_calls"),
    "markers as text": ("</think>Say `<|tool_calls_section_begin|` and </thin", "stop"),
}


@dataclass
class ForcedStages:
    """A maker of stages that sample ``token_ids`` after a prompt of ``num_prompt`` tokens, then the end of a turn."""

    token_ids: Sequence[int]
    end_id: int
    num_prompt: int = 0
    fail_at: int | None = None
    """A stage fails, once, when this token of the reply is sampled."""

    def __call__(self, num_stages: int, on_plan: Callable[[Step], None]) -> TokenStages:
        forced = self

        class Stages(TokenStages):
            def sample(self, token_ids: Sequence[int], sampling: Sampling) -> int:
                at = len(token_ids) - forced.num_prompt
                if at == forced.fail_at:
                    forced.fail_at = None
                    self.fail(1)
                return forced.token_ids[at] if 0 <= at < len(forced.token_ids) else forced.end_id

        return Stages(num_stages, on_plan)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    files = read_model_files(ModelSource(path_or_repo=BUILTIN)).files
    return load_tokenizer(files, describe_model(files, str(BUILTIN_FOLDER)).config.vocab_size)


@contextmanager
def forcing(tokenizer: Tokenizer, reply: str) -> Iterator[tuple[SteppedServer, OpenAI, ForcedStages]]:
    """Yield a server whose model answers ``reply``, the official client, and the stages."""
    ids: list[int] = []
    for piece, is_control in tokens_of(reply):
        ids += [tokenizer.special_ids[piece]] if is_control else tokenizer.encode_text(piece)
    stages = ForcedStages(ids, tokenizer.special_ids["<|im_end|>"])
    with stepped_server(num_slots=2, chunk_tokens=64, make_stages=stages) as server:
        base_url = f"http://127.0.0.1:{server.port}"
        client = OpenAI(base_url=f"{base_url}/v1", api_key="any", max_retries=0, timeout=WAIT_S)
        count = client.with_options(base_url=base_url).post(
            "/tokenize", cast_to=dict[str, Any], body={"messages": USER, "tools": TOOLS}
        )
        stages.num_prompt = count["count"]
        yield server, client, stages


def accumulated(client: OpenAI, **fields: Any) -> dict[str, Any]:
    """Return what the client's own accumulator makes of a stream."""
    with client.chat.completions.stream(model="m", messages=USER, tools=TOOLS, **fields) as stream:
        return comparable(stream.get_final_completion().to_dict())


def body_of(client: OpenAI, **fields: Any) -> dict[str, Any]:
    return comparable(client.chat.completions.create(model="m", messages=USER, tools=TOOLS, **fields).to_dict())


def comparable(body: dict[str, Any]) -> dict[str, Any]:
    (choice,) = body["choices"]
    message = choice["message"]
    return {
        "content": message.get("content") or "",
        "reasoning": message.get("reasoning_content") or "",
        "calls": [
            (one["id"], one["function"]["name"], one["function"]["arguments"])
            for one in message.get("tool_calls") or ()
        ],
        "finish_reason": choice["finish_reason"],
    }


@pytest.mark.parametrize("name", REPLIES)
def test_the_client_accumulates_the_body_of_every_kind_of_reply(tokenizer: Tokenizer, name: str) -> None:
    reply, finish_reason = REPLIES[name]
    with forcing(tokenizer, reply) as (server, client, _), stepping(server):
        body = body_of(client)
        assert accumulated(client) == body
        assert body["finish_reason"] == finish_reason
        if "calls" in name:
            arguments = ('{"text": "one two three four five"}', '{"number": 5777}')
            ids = ("functions.f:0", "functions.mcp__a-b.c:1")
            assert body["calls"] == list(zip(ids, ("f", "mcp__a-b.c"), arguments, strict=True))


@pytest.mark.parametrize("at", [0, 3, 20, 40])
def test_a_restart_in_the_middle_of_a_reply_changes_nothing(tokenizer: Tokenizer, at: int) -> None:
    with forcing(tokenizer, REPLIES["calls"][0]) as (server, client, stages), stepping(server):
        body = body_of(client)
        assert len(stages.token_ids) > 40
        stages.fail_at = at
        server.tokens.may_restart.set()
        assert accumulated(client) == body
        assert len(server.tokens.restarts) == 1


def test_an_error_in_the_middle_reaches_the_client_as_an_error(tokenizer: Tokenizer) -> None:
    with forcing(tokenizer, REPLIES["calls"][0]) as (server, client, stages), stepping(server):
        stages.fail_at = 20
        server.tokens.cancel()
        with pytest.raises(APIError) as caught:
            accumulated(client)
        assert caught.value.code == "unavailable"


def test_parallel_tool_calls_false_ends_the_answer_after_one_call(tokenizer: Tokenizer) -> None:
    with forcing(tokenizer, REPLIES["calls"][0]) as (server, client, _), stepping(server):
        body = body_of(client, parallel_tool_calls=False)
        assert [one[0] for one in body["calls"]] == ["functions.f:0"]
        assert body["finish_reason"] == "tool_calls"
        assert accumulated(client, parallel_tool_calls=False) == body
