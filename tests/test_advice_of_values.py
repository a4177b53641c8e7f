"""Tests of the advice in refusals of hostfiles and single values: a hostfile or value that follows it is accepted."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from mlx_k2.chat.sampling_options import SamplingOptions
from mlx_k2.cluster.hostfile import parse_hostfile
from mlx_k2.coordinator.reply_policy import ReplyLimits
from mlx_k2.deployment.cluster_options import ClusterOptions
from mlx_k2.errors import MlxK2Error, SetupError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Request, check_request
from mlx_k2.server.http_server import listening_socket
from mlx_k2.text.chat_template import ChatTemplate, ThinkingMode, load_chat_template
from mlx_k2.text.constraint import tool_rules
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.schema_check import check_schema

pytestmark = pytest.mark.timeout(60)


def two_hosts(first: str = "", second: str = "", other: str = "") -> str:
    """Return a hostfile of two hosts, with more JSON fields in the first, in the second and beside the hosts."""
    return f'{{"hosts": [{{"ssh": "a"{first}}}, {{"ssh": "b"{second}}}]{other}}}'


IPS = (', "ips": ["10.0.0.1"]', ', "ips": ["10.0.0.2"]')
IPS_WITH_PORTS = tuple(ips.replace('"]', ':5000"]') for ips in IPS)
HOSTFILES = (  # a message with advice, a hostfile that it refuses, and one that follows the advice
    ('"ips": ["192.168.0.1"]', "[]", '[{"ssh": "mac-1.local", "ips": ["192.168.0.1"]}]'),
    (
        "model '' is not a path: leave the key out, or give one",
        two_hosts(IPS[0] + ', "model": ""', IPS[1]),
        two_hosts(IPS[0] + ', "model": "/k2"', IPS[1]),
    ),
    (
        "memory_gb is 0: leave the key out, or give a number above 0 and below 1e9",
        two_hosts(IPS[0] + ', "memory_gb": 0', IPS[1]),
        two_hosts(IPS[0] + ', "memory_gb": 0.5', IPS[1]),
    ),
    (
        "ips holds 'mac': give an IPv4 address in numbers, or ip:port",
        two_hosts(', "ips": ["mac"]', IPS[1]),
        two_hosts(IPS[0], IPS_WITH_PORTS[1]),
    ),
    (
        "mlx-k2 does not run over backend 'mpi': write one of ring, ",
        two_hosts(*IPS, ', "backend": "mpi"'),
        two_hosts(*IPS, ', "backend": "ring"'),
    ),
    (
        "has already: give each its own port, or leave the port out and one is picked",
        two_hosts(IPS_WITH_PORTS[0], IPS_WITH_PORTS[0]),
        two_hosts(IPS_WITH_PORTS[0], IPS_WITH_PORTS[0].replace("5000", "5001")),
    ),
    (
        'which backend ring needs: add "ips": ["its address"], or let mlx.distributed_config write the hostfile',
        two_hosts(),
        two_hosts(*IPS),
    ),
)


@pytest.mark.parametrize(("message", "wrong", "right"), HOSTFILES)
def test_a_hostfile_that_follows_the_advice_of_its_refusal_is_accepted(message: str, wrong: str, right: str) -> None:
    with pytest.raises(SetupError, match=re.escape(message)):
        parse_hostfile(wrong.encode(), "hosts.json")
    assert parse_hostfile(right.encode(), "hosts.json").warnings == ()


def check_fields(**changes: Any) -> None:
    fields: dict[str, Any] = {
        "prompt_ids": (1,),
        "max_tokens": 1,
        "sampling": Sampling(seed=1),
        "stop_ids": frozenset(),
    }
    check_request(Request(**fields | changes), 100, 10)


def read_message(content: object, role: str = "user") -> object:
    return read_history([{"role": role, "content": content}], ())


def preserve_thinking(source: str) -> object:
    return ThinkingMode(preserve_thinking=True).variables(ChatTemplate(source))


TEMPLATE = {"chat_template.jinja": b"{{ messages[0].content }}"}
# Rows of a message with advice, a call that it refuses, and a call that follows the advice.
VALUES: tuple[tuple[str, Callable[[], object], Callable[[], object]], ...] = (
    ("stop is a text: give a tuple of texts, as in ('a',)", lambda: SamplingOptions(stop="a"),  # type: ignore[arg-type]
     lambda: SamplingOptions(stop=("a",))),
    ("timeout is 0 s: give more than 0", lambda: SamplingOptions(timeout_s=0), lambda: SamplingOptions(timeout_s=0.1)),
    ("an answer has one form: give a JSON schema, a regular expression or a Lark grammar",
     lambda: SamplingOptions(regex="a", lark="b"), lambda: SamplingOptions(regex="a")),
    ("a stop string is empty: give at least one character", lambda: ReplyLimits(("",)), lambda: ReplyLimits(("a",))),
    ("temperature -1.0 is out of range: give a value from 0", lambda: Sampling(seed=1, temperature=-1.0),
     lambda: Sampling(seed=1, temperature=0.0)),
    ("a token has two logit biases: give each token id once", lambda: Sampling(seed=1, logit_bias=((1, 1.0), (1, 2.0))),
     lambda: Sampling(seed=1, logit_bias=((1, 1.0), (2, 2.0)))),
    ("dtype int8 is unknown: give bfloat16 or float32", lambda: ClusterOptions(dtype="int8"),
     lambda: ClusterOptions(dtype="bfloat16")),
    ("the prompt is empty: give some text, or token ids", lambda: check_fields(prompt_ids=()), check_fields),
    ("so there is no room for an answer: shorten it, or give a larger --context, up to that of the model",
     lambda: check_fields(prompt_ids=(1,) * 10),
     lambda: check_fields(prompt_ids=(1,) * 9)),
    ("max-tokens is 0: give at least 1", lambda: check_fields(max_tokens=0), lambda: check_fields(max_tokens=1)),
    ("timeout is 0 s: give more than 0", lambda: check_fields(timeout_s=0.0), lambda: check_fields(timeout_s=0.1)),
    ("513 tools are declared: declare at most 512", lambda: tool_rules([{"function": {"name": "f"}}] * 513),
     lambda: tool_rules([{"function": {"name": "f"}}] * 512)),
    ("tool_choice is required, and no tool is declared: declare one, or leave it out",
     lambda: tool_rules([], "required"), lambda: tool_rules([{"function": {"name": "f"}}], "required")),
    ("a tool has no function with a name: declare tools in OpenAI's format", lambda: tool_rules([{"name": "f"}]),
     lambda: tool_rules([{"type": "function", "function": {"name": "f"}}])),
    ("tool_choice 5 is unknown: give auto, none, required, or a function's name", lambda: tool_rules([], 5),
     lambda: tool_rules([], "auto")),
    ("has the role 'wizard': give one of system, user, assistant, tool", lambda: read_message("a", "wizard"),
     lambda: [read_message("a", "system"), read_message("a", "user"), read_message("a", "assistant")]),
    ("has an image, and mlx-k2 runs a model's text part only: leave the image out",
     lambda: read_message([{"type": "image_url"}]), lambda: read_message([{"type": "text", "text": "a"}])),
    ("has a part that is not text (audio): leave it out", lambda: read_message([{"type": "audio"}]),
     lambda: read_message([])),
    ("the schema is not a JSON schema: give a JSON object", lambda: check_schema(5, "the schema"),
     lambda: check_schema({}, "the schema")),
    ("does not read the variable preserve_thinking (leave out --preserve-thinking)", lambda: preserve_thinking("a"),
     lambda: ThinkingMode().variables(ChatTemplate("a"))),
    ("the model has no chat template: give --raw to send the prompt unchanged", lambda: load_chat_template({}),
     lambda: load_chat_template(TEMPLATE)),
    ("--host mac! is not an address: give one of this machine's, as 127.0.0.1",
     lambda: listening_socket("mac!", 0).close(), lambda: listening_socket("127.0.0.1", 0).close()),
)  # fmt: skip


@pytest.mark.parametrize(("message", "wrong", "right"), VALUES)
def test_a_value_that_follows_the_advice_of_its_refusal_is_accepted(
    message: str, wrong: Callable[[], object], right: Callable[[], object]
) -> None:
    with pytest.raises(MlxK2Error, match=re.escape(message)):
        wrong()
    right()
