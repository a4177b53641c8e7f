"""Tests of the schemas in tests/coordinator/goldens over HTTP: as the format of an answer, and as a tool's parameters.

Two models on two stages each: the built-in one, and one with random weights. Each request is sent twice, streamed and
not. The long profile has all schemas, other profiles have every 30th.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import hypothesis
import jsonschema
import pytest

from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from tests.cli.command import CommandLine
from tests.coordinator.schemas import SCHEMAS, TOOL, as_parameters
from tests.local_cluster import VOCAB_SIZE, write_model
from tests.server.chat_client import Completion, create_completion, stream_completion
from tests.server.forced_replies import builtin_tokenizer
from tests.server.server_process import Server, running_server

IS_LONG = hypothesis.settings.get_current_profile_name() == "long"
TESTED_SCHEMAS = dict(list(SCHEMAS.items())[:: 1 if IS_LONG else 30])
MAX_UNBIASED_TOKENS = 200 if IS_LONG else 60
BIAS = 20.0
CONTEXT_TOKENS = 12_000


@dataclass(frozen=True)
class Model:
    """A served model, its tokenizer, and the characters that end values in its answers."""

    server: Server
    tokenizer: Tokenizer
    end_characters: bytes

    @property
    def bias(self) -> dict[str, float]:
        """A bias for the tokens that begin with an end character."""
        ids = range(self.tokenizer.vocab_size)
        return {str(token_id): BIAS for token_id in ids if self._ends_value(self.tokenizer.token_bytes(token_id))}

    def _ends_value(self, token: bytes) -> bool:
        return token != b"" and token[0] in self.end_characters


@pytest.fixture(scope="module")
def builtin_model(server: Server) -> Model:
    """The built-in model. With a bias for the comma, too, some of its lists would not end."""
    return Model(server, builtin_tokenizer(), b'"}]')


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A model with random weights."""
    folder = write_model(tmp_path_factory.mktemp("model") / "tiny", CONTEXT_TOKENS)
    options = ("--model", str(folder), "--stages", "2", "--context", str(CONTEXT_TOKENS), "--max-sequences", "4")
    with running_server(CommandLine(tmp_path_factory.mktemp("home")), *options) as server:
        tokenizer = load_tokenizer(tiny_vocabulary(VOCAB_SIZE, CONTEXT_TOKENS).files, VOCAB_SIZE)
        yield Model(server, tokenizer, b'"}],')


@pytest.fixture(scope="module", params=["builtin", pytest.param("random", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Model:
    """Return a served model, which starts when it is used first."""
    model: Model = request.getfixturevalue(f"{request.param}_model")
    return model


def answer_and_call(model: Model, schema: Any, **fields: Any) -> tuple[Completion, Completion]:
    """Return an answer of this schema, and a reply that calls a tool with it. Check that each equals its stream."""
    answer_format = {"type": "json_schema", "json_schema": {"name": "record", "schema": schema}}
    tool = {"type": "function", "function": {"name": TOOL, "parameters": as_parameters(schema)}}
    request: dict[str, Any] = {
        "model": "any",
        "messages": [{"role": "user", "content": "Record it."}],
        "temperature": 1.0,
        "extra_body": {"thinking": {"type": "enabled", "budget_tokens": 4}},
        "timeout": 600.0,  # four replies of 4,096 tokens at once
    }
    answer_request = request | {"response_format": answer_format} | fields
    call_request = request | {"tools": [tool], "tool_choice": "required"} | fields
    with ThreadPoolExecutor(4) as pool:
        streamed_answer = pool.submit(stream_completion, model.server, **answer_request)
        streamed_call = pool.submit(stream_completion, model.server, **call_request)
        answer = pool.submit(create_completion, model.server, **answer_request)
        call = pool.submit(create_completion, model.server, **call_request)
    assert streamed_answer.result() == answer.result()
    assert streamed_call.result() == call.result()
    return answer.result(), call.result()


def check_answer(answer: Completion, schema: Any) -> None:
    """Check that a complete answer follows the schema."""
    assert answer.finish_reason == "stop"
    assert answer.calls == []
    jsonschema.validate(json.loads(answer.content), schema)


def check_calls(reply: Completion, schema: Any) -> None:
    """Check that a complete reply consists of calls whose arguments follow the schema."""
    assert reply.finish_reason == "tool_calls"
    assert reply.calls
    assert reply.content == ""
    for number, call in enumerate(reply.calls):
        assert (call.name, call.id) == (TOOL, f"functions.{TOOL}:{number}")
        jsonschema.validate(json.loads(call.arguments), as_parameters(schema))


@pytest.mark.parametrize("schema", TESTED_SCHEMAS.values(), ids=TESTED_SCHEMAS)
def test_with_a_bias_for_tokens_that_end_values_replies_are_complete_and_valid(model: Model, schema: Any) -> None:
    answer, call = answer_and_call(model, schema, logit_bias=model.bias, max_tokens=4096, seed=4)
    check_answer(answer, schema)
    check_calls(call, schema)


@pytest.mark.slow
@pytest.mark.parametrize("schema", TESTED_SCHEMAS.values(), ids=TESTED_SCHEMAS)
def test_without_a_bias_replies_are_valid_or_end_with_length(model: Model, schema: Any) -> None:
    replies = answer_and_call(model, schema, max_tokens=MAX_UNBIASED_TOKENS, seed=5)
    for reply, check in zip(replies, (check_answer, check_calls), strict=True):
        if reply.finish_reason == "length":
            assert reply.usage["completion_tokens"] == MAX_UNBIASED_TOKENS
        else:
            check(reply, schema)
