"""Tests of the schemas of another project's suites over HTTP: as the form of an answer, and as parameters of a tool.

Two models on two stages each: the built-in one, and one with random weights. Each request is sent twice, streamed and
not. The long profile has all schemas.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import hypothesis
import jsonschema
import pytest

from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from tests.coordinator.schemas import SCHEMAS, TOOL, as_parameters
from tests.local_cluster import VOCAB_SIZE, write_model
from tests.server.forced_replies import builtin_tokenizer
from tests.server.server_process import Server, home_of, serving
from tests.server.test_chat_completions import body_fields, stream_fields, without_cache

IS_LONG = hypothesis.settings.get_current_profile_name() == "long"
SOME = dict(list(SCHEMAS.items())[:: 1 if IS_LONG else 30])
MAX_TOKENS = 200 if IS_LONG else 60
"""Without a bias."""
BIAS = 20.0
CONTEXT_TOKENS = 12_000


@dataclass(frozen=True)
class Model:
    """A served model, its tokenizer, and the letters with which the tokens begin that a bias makes likely."""

    server: Server
    tokenizer: Tokenizer
    letters: bytes

    @property
    def bias(self) -> dict[str, float]:
        """A bias for the tokens that end values."""
        first = {number: self.tokenizer.token_bytes(number)[:1] for number in range(self.tokenizer.vocab_size)}
        return {str(number): BIAS for number, letter in first.items() if letter and letter in self.letters}


@pytest.fixture(scope="module")
def builtin_model(server: Server) -> Model:
    """The built-in model. It prefers a comma to an end: with a bias for both, some of its lists would not end."""
    return Model(server, builtin_tokenizer(), b'"}]')


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A random checkpoint."""
    folder = write_model(tmp_path_factory.mktemp("model") / "tiny", CONTEXT_TOKENS)
    options = ("--model", str(folder), "--stages", "2", "--context", str(CONTEXT_TOKENS), "--max-sequences", "4")
    with serving(home_of(tmp_path_factory.mktemp("home")), *options) as other:
        tokenizer = load_tokenizer(tiny_vocabulary(VOCAB_SIZE, CONTEXT_TOKENS).files, VOCAB_SIZE)
        yield Model(other, tokenizer, b'"}],')


@pytest.fixture(scope="module", params=["builtin", pytest.param("random", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest) -> Model:
    """Return a served model. It starts when it is used first."""
    found: Model = request.getfixturevalue(f"{request.param}_model")
    return found


def replies_to(model: Model, schema: Any, **fields: Any) -> list[tuple[dict[str, Any], Any]]:
    """Return two replies, each with the schema of its values. Both are the same streamed and not.

    The first reply is an answer of this schema, the second calls a tool with such parameters.
    """
    parameters = as_parameters(schema)
    form = {"type": "json_schema", "json_schema": {"name": "record", "schema": schema}}
    tool = {"type": "function", "function": {"name": TOOL, "parameters": parameters}}
    wanted: list[tuple[dict[str, Any], Any]] = [
        ({"response_format": form}, schema),
        ({"tools": [tool], "tool_choice": "required"}, parameters),
    ]
    base: dict[str, Any] = {
        "model": "any",
        "messages": [{"role": "user", "content": "Record it."}],
        "temperature": 1.0,
        "extra_body": {"thinking": {"type": "enabled", "budget_tokens": 4}},
        "timeout": 600.0,  # four replies of 4,096 tokens at once
    }
    asks: list[Callable[..., dict[str, Any]]] = [stream_fields, body_fields]
    with ThreadPoolExecutor(4) as pool:
        found = [[pool.submit(ask, model.server, **base, **asked, **fields) for ask in asks] for asked, _ in wanted]
        replies = [[without_cache(one.result(timeout=600)) for one in pair] for pair in found]
    for from_stream, whole in replies:
        assert from_stream == whole
    return [(whole, valid) for (_, whole), (_, valid) in zip(replies, wanted, strict=True)]


def check(reply: dict[str, Any], valid: Any, *, is_call: bool) -> None:
    """Check that a complete reply is what was demanded."""
    assert reply["finish_reason"] == ("tool_calls" if is_call else "stop")
    assert bool(reply["tool_calls"]) is is_call and bool(reply["content"]) is not is_call
    values = [call["arguments"] for call in reply["tool_calls"]] or [reply["content"]]
    for text in values:
        jsonschema.validate(json.loads(text), valid)
    expected = [(TOOL, f"functions.{TOOL}:{number}") for number in range(len(reply["tool_calls"]))]
    assert [(call["name"], call["id"]) for call in reply["tool_calls"]] == expected


@pytest.mark.parametrize("schema", SOME.values(), ids=SOME)
def test_with_a_bias_for_tokens_that_end_values_replies_are_complete_and_valid(model: Model, schema: Any) -> None:
    answer, call = replies_to(model, schema, logit_bias=model.bias, max_tokens=4096, seed=4)
    check(*answer, is_call=False)
    check(*call, is_call=True)


@pytest.mark.slow
@pytest.mark.parametrize("schema", SOME.values(), ids=SOME)
def test_without_a_bias_replies_are_valid_or_end_with_length_and_are_no_call(model: Model, schema: Any) -> None:
    for reply, valid in replies_to(model, schema, max_tokens=MAX_TOKENS, seed=5):
        if reply["finish_reason"] == "length":
            assert reply["usage"]["completion_tokens"] == MAX_TOKENS
        else:
            check(reply, valid, is_call=bool(reply["tool_calls"]))
