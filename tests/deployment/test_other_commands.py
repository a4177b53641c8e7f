"""Tests that a command names another one whose real stages run on the same host."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_k2.cluster.host_facts import Command, RunningStage
from mlx_k2.cluster.memory import memory_bound_bytes
from mlx_k2.deployment.deploy import Deployment, deploy
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.other_commands import describe_others
from mlx_k2.protocol.messages import Hello
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from tests.cli.command import CommandLine
from tests.local_cluster import VOCAB_SIZE, local_host, local_request

pytestmark = pytest.mark.timeout(100)

LONG_CONTEXT = 262_144
"""A context with a cache of 587 MB per slot, which is reserved but never filled here."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    files = tiny_vocabulary(VOCAB_SIZE, LONG_CONTEXT).files | {"generation_config.json": b"{}"}
    write_random_checkpoint(folder, tiny_config_fields(VOCAB_SIZE, max_position_embeddings=LONG_CONTEXT), 20, files)
    return folder


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Make a home folder for this test's commands and stages, so that they see no others."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return CommandLine(tmp_path)


@contextmanager
def running(
    model: Path, num_stages: int, num_slots: int, context_tokens: int, address: str | None = None
) -> Iterator[Deployment]:
    """Yield running stages of this process."""
    request = local_request(model, [local_host()] * num_stages).with_options(context_tokens=context_tokens)
    with deploy(replace(request, num_slots=num_slots, address=address), None, DeploymentListener()) as deployment:
        yield deployment


def generate(user: CommandLine, model: Path, context_tokens: int) -> tuple[int, str]:
    """Run `mlx-k2 generate`; return its exit code and stderr."""
    arguments = ("--model", str(model), "--context", str(context_tokens), "--max-tokens", "1")
    result = user.run("generate", "hi", *arguments)
    return result.returncode, result.stderr


@pytest.mark.slow
def test_another_command_that_holds_1_gb_is_named_with_its_stages_on_the_host(user: CommandLine, model: Path) -> None:
    with running(model, num_stages=2, num_slots=3, context_tokens=LONG_CONTEXT):
        exit_code, stderr = generate(user, model, 100)
    assert exit_code == 0
    name = r"`[^`]+`, since \d\d:\d\d, 1\.8 GB"
    line = rf"this machine also runs 2 stages of another mlx-k2 command \(pid {os.getpid()}, {name}\)"
    assert len(re.findall(line, stderr)) == 1, stderr


@pytest.mark.slow
def test_a_server_is_named_with_the_address_for_connect(user: CommandLine, model: Path) -> None:
    with running(model, 1, num_slots=3, context_tokens=LONG_CONTEXT, address="http://127.0.0.1:8080"):
        exit_code, stderr = generate(user, model, 100)
    assert exit_code == 0
    assert "GB); --connect http://127.0.0.1:8080 uses its model" in stderr


@pytest.mark.parametrize(
    ("host", "address", "is_named"),
    [
        ("mac1", "http://127.0.0.1:8080", True),
        ("mac2", "http://127.0.0.1:8080", False),
        ("mac2", "http://[::1]:8080", False),
        ("mac2", "http://mac2:8080", True),
        ("mac2", None, False),
    ],
)
def test_a_servers_address_is_named_if_this_host_can_reach_it(host: str, address: str | None, is_named: bool) -> None:
    own, other = Command("mac1", 1, "mlx-k2 chat", 0.0), Command(host, 2, "mlx-k2 serve", 0.0, address)
    hello = Hello(
        mlx_k2_version="1",
        mlx_version="1",
        python_version="3",
        system="macOS",
        memory_bytes=10**11,
        working_set_bytes=None,
        running_stages=(RunningStage(other, 10**10),),
    )
    (line,) = describe_others(["mac1"], [hello], own)
    assert ("--connect" in line) == is_named


@pytest.mark.slow
def test_a_command_that_holds_less_than_1_gb_or_has_ended_is_not_named(user: CommandLine, model: Path) -> None:
    with running(model, num_stages=1, num_slots=1, context_tokens=LONG_CONTEXT):
        exit_code, stderr = generate(user, model, 100)
        assert exit_code == 0
        assert "also runs" not in stderr
    with running(model, num_stages=1, num_slots=3, context_tokens=LONG_CONTEXT):
        pass
    assert "also runs" not in generate(user, model, 100)[1]


@pytest.mark.slow
def test_memory_of_another_command_is_not_used_and_the_error_names_the_command(user: CommandLine, model: Path) -> None:
    with running(model, num_stages=1, num_slots=1, context_tokens=LONG_CONTEXT) as deployment:
        hello, (plan,) = deployment.hellos[0], deployment.plans
    available_bytes = memory_bound_bytes(None, hello.working_set_bytes, hello.memory_bytes)
    assert available_bytes is not None
    slot_bytes = plan.assignment.held_bytes - plan.shard_bytes
    num_slots = 1 + (available_bytes - plan.needed_bytes) // slot_bytes  # another slot does not fit
    with running(model, num_stages=1, num_slots=num_slots, context_tokens=LONG_CONTEXT):
        exit_code, stderr = generate(user, model, LONG_CONTEXT)
        assert exit_code != 0
        assert "the model does not fit" in stderr
        assert f"this machine also runs 1 stage of another mlx-k2 command (pid {os.getpid()}, " in stderr
    assert generate(user, model, LONG_CONTEXT)[0] == 0
