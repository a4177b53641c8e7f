"""Tests of the lines that name another mlx-k2 command whose stages run on the same host."""

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
from tests.cli.command import CommandLine
from tests.local_cluster import local_host, local_request, write_model

pytestmark = pytest.mark.timeout(100)

LONG_CONTEXT_TOKENS = 262_144
"""The stages reserve a cache of 587 MB per slot, which these tests do not fill."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model", LONG_CONTEXT_TOKENS)


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Make a home folder for this test's commands and stages, so that they find no stages of other tests."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return CommandLine(tmp_path)


@contextmanager
def deployment_of(
    model: Path, *, num_stages: int = 1, num_slots: int, address: str | None = None
) -> Iterator[Deployment]:
    """Yield ready stages of this process on this machine, with a cache of LONG_CONTEXT_TOKENS for each slot."""
    request = local_request(model, [local_host()] * num_stages).with_options(context_tokens=LONG_CONTEXT_TOKENS)
    with deploy(replace(request, num_slots=num_slots, address=address), None, DeploymentListener()) as deployment:
        yield deployment


def generate(user: CommandLine, model: Path, context_tokens: int = 100) -> tuple[int, str]:
    """Run ``generate`` for one token; return its exit code and its stderr."""
    arguments = ("--model", str(model), "--context", str(context_tokens), "--max-tokens", "1")
    result = user.run("generate", "hi", *arguments)
    return result.returncode, result.stderr


@pytest.mark.slow
def test_another_command_that_holds_1_gb_is_named_with_its_stages_on_the_host(user: CommandLine, model: Path) -> None:
    with deployment_of(model, num_stages=2, num_slots=3):
        exit_code, stderr = generate(user, model)
    assert exit_code == 0
    command = r"`[^`]+`, since \d\d:\d\d, 1\.8 GB"  # 3 slots
    line = rf"this machine also runs 2 stages of another mlx-k2 command \(pid {os.getpid()}, {command}\)"
    assert len(re.findall(line, stderr)) == 1, stderr


@pytest.mark.slow
def test_a_server_is_named_with_the_address_for_connect(user: CommandLine, model: Path) -> None:
    with deployment_of(model, num_slots=3, address="http://127.0.0.1:8080"):
        exit_code, stderr = generate(user, model)
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
def test_the_address_of_a_server_is_named_unless_it_is_the_loopback_of_another_host(
    host: str, address: str | None, is_named: bool
) -> None:
    own = Command("mac1", pid=1, name="mlx-k2 chat", began_unix_s=0.0)
    other = Command(host, pid=2, name="mlx-k2 serve", began_unix_s=0.0, address=address)
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
    with deployment_of(model, num_slots=1):
        exit_code, stderr = generate(user, model)
        assert exit_code == 0
        assert "also runs" not in stderr
    with deployment_of(model, num_slots=3):
        pass
    assert "also runs" not in generate(user, model)[1]


@pytest.mark.slow
def test_memory_of_another_command_is_not_planned_again_and_the_error_names_it(user: CommandLine, model: Path) -> None:
    with deployment_of(model, num_slots=1) as deployment:
        hello, (plan,) = deployment.hellos[0], deployment.plans
    available_bytes = memory_bound_bytes(None, hello.working_set_bytes, hello.memory_bytes)  # no limit in a hostfile
    assert available_bytes is not None
    slot_bytes = plan.assignment.held_bytes - plan.shard_bytes
    num_slots = 1 + (available_bytes - plan.needed_bytes) // slot_bytes  # another slot does not fit
    with deployment_of(model, num_slots=num_slots):
        exit_code, stderr = generate(user, model, LONG_CONTEXT_TOKENS)
        assert exit_code != 0
        assert "the model does not fit" in stderr
        assert f"this machine also runs 1 stage of another mlx-k2 command (pid {os.getpid()}, " in stderr
    assert generate(user, model, LONG_CONTEXT_TOKENS)[0] == 0
