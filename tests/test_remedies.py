"""Tests of the commands and options that errors propose: each one works, or has the arguments that its tool expects."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.benchmark import Workload, check_workloads
from mlx_k2.cluster.hostfile import Backend, Host, Hostfile
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest
from mlx_k2.deployment.dry_run import plan_for
from mlx_k2.deployment.plan import HostMemory
from mlx_k2.errors import PartitionError, RequestError
from mlx_k2.launch.ssh import WHEEL, command_on, explain_ssh_failure, install_commands
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.index import CheckpointIndex
from mlx_k2.weights.inventory import model_specs
from mlx_k2.weights.known_layout import thinking_config_fields
from mlx_k2.weights.model_source import ModelSource
from tests.advice import follows_advice
from tests.examples import scaled
from tests.weights.tiny_checkpoints import config_of

pytestmark = pytest.mark.timeout(60)
THINKING = "moonshotai/Kimi-K2-Thinking"
NOT_KNOWN = HostMemory(working_set_bytes=None, ram_bytes=None)
"""The measured memory of a host before it is measured: plans use the hostfile's ``memory_gb``."""
FAILURES = (
    "WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!",
    "Host key verification failed.",
    "Permission denied (publickey).",
    "Could not resolve hostname",
    "Connection refused",
    "Connection timed out",
    "something else",
)
HOSTS = ("mac-1", "mac-1.local", "kim@mac-1", "kim@mac-1.example.org", "10.0.0.7", "kim@10.0.0.7", "kim@fe80::1")
HOST_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ1Fd7sCqYmEJ2pVNJ0kjV7TtQyTFt7dLz0Jm0Y4gA0V"


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout


def commands_in(text: str) -> list[str]:
    """Return the commands in backquotes."""
    return re.findall(r"`([^`]+)`", text)


@follows_advice(
    "reinstalled, remove the old key with `ssh-keygen -R mac-1`, then run `ssh mac-1` once and compare the new one",
    "a: run `ssh mac-1` once and accept it, or `ssh-keyscan mac-1 >> ~/.ssh/known_hosts`",
    "a: run `ssh-copy-id mac-1`, then see that `ssh mac-1 true` asks for no password",
    "a: check its spelling, or give it a HostName in ~/.ssh/config",
    "or run `sudo systemsetup -setremotelogin on` on it",
    "it cannot be reached: see that it is switched on, awake and on this network with `ping mac-1`",
    "ssh failed: it printed no reason; try `ssh mac-1 true`",
)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("stderr", FAILURES)
def test_commands_for_an_ssh_failure_name_the_host_as_tools_parse_it(tmp_path: Path, host: str, stderr: str) -> None:
    user, _, name = host.rpartition("@")
    text = explain_ssh_failure(host, stderr)
    assert ".local.local" not in text
    has_plain_name = "." not in host and ":" not in host
    assert (f"answer to {host}.local" in text) == (stderr == "Could not resolve hostname" and has_plain_name)
    for command in commands_in(text):
        match shlex.split(command):
            case ["ssh", *arguments]:
                settings = output_of("ssh", "-G", *arguments)
                assert f"hostname {name}\n" in settings
                assert not user or f"user {user}\n" in settings
            case ["ssh-keygen", *arguments]:
                known_hosts = tmp_path / "known_hosts"
                known_hosts.write_text(f"{name} {HOST_KEY}\n")
                output_of("ssh-keygen", *arguments, "-f", str(known_hosts))
                assert known_hosts.read_text() == ""
            case ["ssh-keyscan" | "ping", argument, *_]:
                assert argument == name
            case ["ssh-copy-id", *arguments]:
                assert arguments == [host]
            case [program, *_]:
                assert program == "sudo"


@given(
    words=st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8), max_size=4)
)
def test_a_command_for_another_host_passes_through_both_shells_unchanged(words: list[str]) -> None:
    ssh, host, *remote = shlex.split(command_on("kim@mac 1", "python3", *words))
    assert (ssh, host) == ("ssh", "kim@mac 1")
    assert shlex.split(" ".join(remote)) == ["python3", *words]  # ssh joins its arguments for the other shell


def test_the_shell_of_the_other_host_replaces_the_tilde_of_a_path(tmp_path: Path) -> None:
    _, _, remote = shlex.split(command_on("mac-1", "~/my venv/bin/python", "-m", "pip"))
    output = output_of("env", f"HOME={tmp_path}", "sh", "-c", f"printf '%s|' {remote}")
    assert output == f"{tmp_path}/my venv/bin/python|-m|pip|"


@follows_advice(
    "run `make dist` in mlx-k2's source folder, then `scp dist/mlx_k2.whl mac-1:` and `ssh mac-1 python3 -m "
    "pip install ./mlx_k2.whl`",
    "a: install the same on both, from one wheel (make dist)",
)
@pytest.mark.parametrize("python", ["python3", "/opt/my k2/bin/python", "~/k2/bin/python"])
@pytest.mark.parametrize("ssh", [None, "mac-1", "kim@mac-1"])
def test_the_commands_that_install_mlx_k2_have_the_arguments_for_scp_ssh_and_pip(ssh: str | None, python: str) -> None:
    make, *install = commands_in(install_commands(ssh, python))
    assert make == "make dist"
    words = shlex.split(install[-1])
    if ssh is not None:
        assert shlex.split(install[0]) == ["scp", f"dist/{WHEEL}", f"{ssh}:"]
        assert words[:2] == ["ssh", ssh]
        words = shlex.split(" ".join(words[2:]))
    assert words == [python, "-m", "pip", "install", f"{'dist' if ssh is None else '.'}/{WHEEL}"]


@pytest.fixture(scope="module")
def model() -> ModelDescription:
    """Return a model of 61 layers and 35 GB. With eight experts in a layer a plan takes milliseconds."""
    config = config_of(thinking_config_fields(n_routed_experts=8))
    index = CheckpointIndex({spec.name: "model.safetensors" for spec in model_specs(config)}, "index")
    return ModelDescription({}, config, index, "digest", None)


def request_on(
    *memory_gb: float, context: int | None = None, split: tuple[int, ...] | None = None
) -> DeploymentRequest:
    """Return a deployment request with one host for each value of ``memory_gb``."""
    hosts = tuple(Host(ssh=f"mac-{rank}", ips=("10.0.0.1",), memory_gb=gb) for rank, gb in enumerate(memory_gb))
    hostfile = Hostfile(hosts=hosts, backend=Backend.RING)
    options = ClusterOptions(split=split, context_tokens=context)
    return DeploymentRequest(options, hostfile, ModelSource(path_or_repo=THINKING))


@follows_advice(
    "leave --split out",
    "give --context 1000",
    "give --dense-bits 8",
)
@settings(max_examples=scaled(40))
@given(
    memory_gb=st.lists(st.integers(5, 60), min_size=1, max_size=3),
    context=st.sampled_from([None, 1000, 262_144]),
    is_split=st.booleans(),
)
def test_each_option_that_an_error_of_memory_proposes_makes_the_model_fit(
    model: ModelDescription, memory_gb: list[int], context: int | None, is_split: bool
) -> None:
    num_others = len(memory_gb) - 1
    split = (model.config.num_hidden_layers - num_others, *[1] * num_others) if is_split else None
    request = request_on(*memory_gb, context=context, split=split)
    memories = [NOT_KNOWN] * len(memory_gb)
    try:
        plan_for(request, model, memories, all_on_gpu=True)
    except PartitionError as error:
        hints = re.findall(r", or (leave --split out|give --\S+ \d+)", str(error))
        assert str(error).count(", or ") == len(hints)
        for hint in hints:
            match hint.split():
                case ["leave", "--split", "out"]:
                    changed = request.with_options(split=None)
                case ["give", "--context", tokens]:
                    changed = request.with_options(context_tokens=int(tokens))
                case [*_, bits]:  # give --dense-bits
                    changed = request.with_options(dense_bits=int(bits))
            plan_for(changed, model, memories, all_on_gpu=True)


@follows_advice(
    "the model does not fit: it needs 35 GB: add a host or memory",
    "the model does not fit in whole layers of up to 1 GB: a: add a host or memory",
)
def test_without_an_option_that_helps_none_is_proposed(model: ModelDescription) -> None:
    with pytest.raises(PartitionError, match=r"add a host or memory$"):
        plan_for(request_on(5, 5), model, [NOT_KNOWN] * 2, all_on_gpu=True)


@follows_advice(
    "give --context 150",
)
def test_a_context_beyond_the_models_own_is_never_proposed() -> None:
    workload = Workload(prompt_tokens=100, generate_tokens=50, streams=1)
    with pytest.raises(RequestError, match=r"do not fit into a context of 100 tokens: give --context 150$"):
        check_workloads([workload], context_tokens=100, max_context_tokens=200)
    with pytest.raises(RequestError, match=r"do not fit into a context of 100 tokens: at most 120 are possible$"):
        check_workloads([workload], context_tokens=100, max_context_tokens=120)
