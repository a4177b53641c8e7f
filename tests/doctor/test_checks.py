"""Tests of the doctor's checks: the facts of a host give ok, or a warning or failure with what to do."""

import re
from dataclasses import replace

import msgspec
import pytest

from mlx_k2.cluster.host_facts import HopSpeed, HostFacts, ModelFacts
from mlx_k2.cluster.hostfile import Backend, Host
from mlx_k2.doctor.checks import (
    Check,
    CheckResult,
    check_addresses,
    check_answer,
    check_backend,
    check_copies,
    check_environment,
    check_hop,
    check_memory,
    check_model,
    check_sleep,
    check_versions,
)
from mlx_k2.launch.ssh import WHEEL
from mlx_k2.protocol.messages import Hello
from tests.advice import follows_advice
from tests.cluster.test_mac_settings import BRIDGE, DEVICES, NO_DEVICES, PMSET

VERSIONS_HERE = {"mlx-k2": "0.1.0", "mlx": "0.32.4"}
GB = 10**9
HOST = Host(ssh="mac-2", ips=("192.168.0.2",), rdma=("rdma_en5", None))
HELLO = Hello(
    mlx_k2_version="0.1.0",
    mlx_version="0.32.4",
    python_version="3.12.1",
    system="macOS 26.4",
    memory_bytes=512 * GB,
    working_set_bytes=400 * GB,
)
FACTS = HostFacts(
    memory_free_bytes=480 * GB,
    interfaces={"127.0.0.1": "lo0", "192.168.0.2": "en5"},
    backends=("ring", "jaccl"),
    environment={},
    settings={"pmset": PMSET, "rdma_ctl": "enabled\n", "ibv_devices": DEVICES, "bridge0": ""},
)
MODEL = ModelFacts(folder="/models/k2", num_files=30, disk_free_bytes=900 * GB)
DOWNLOAD_COMMAND = "mlx-k2 download --hostfile two-macs.json --model moonshotai/Kimi-K2-Thinking"

OK, WARNING, FAILURE = CheckResult.OK, CheckResult.WARNING, CheckResult.FAILURE


def facts(**changes: object) -> HostFacts:
    return msgspec.structs.replace(FACTS, **changes)


def tool_output(**changes: str) -> HostFacts:
    """Return FACTS with changed output of macOS's tools."""
    return facts(settings=FACTS.settings | changes)


def model(**changes: object) -> ModelFacts:
    return msgspec.structs.replace(MODEL, **changes)


def hello(**changes: object) -> Hello:
    return msgspec.structs.replace(HELLO, **changes)


def package_check(**changes: str) -> list[Check]:
    package, _ = check_versions(HOST, hello(**changes), VERSIONS_HERE, Backend.RING, {"macOS 26.4"})
    return [package]


def system_check(backend: Backend) -> list[Check]:
    """Return the check of a host's macOS when another host runs an older one."""
    _, system = check_versions(HOST, HELLO, VERSIONS_HERE, backend, {"macOS 26.4", "macOS 26.2"})
    return [system]


def memory_check(needed_gb: int, free_gb: int = 480) -> list[Check]:
    return [check_memory(HELLO, free_bytes=free_gb * GB, needed_bytes=needed_gb * GB)]


def jaccl_check(host_facts: HostFacts, system: str = "macOS 26.4") -> list[Check]:
    return [check_backend(HOST, Backend.JACCL, hello(system=system), host_facts)]


CASES: dict[str, tuple[list[Check], CheckResult, str]] = {
    "an old package": (
        package_check(mlx_version="0.31.0"),
        FAILURE,
        "`ssh mac-2 python3 -m pip install mlx==0.32.4`",
    ),
    "an old mlx-k2": (
        package_check(mlx_k2_version="0.0.9"),
        FAILURE,
        f"`ssh mac-2 python3 -m pip install ./{WHEEL}`",
    ),
    "another macOS": (system_check(Backend.RING), WARNING, "update all to the same"),
    "another macOS under RDMA": (system_check(Backend.JACCL), FAILURE, "update all to the same"),
    "a wired limit that is too low": (
        memory_check(needed_gb=420),
        FAILURE,
        "`sudo sysctl iogpu.wired_limit_mb=400544`",  # 420 GB in units of 2^20 bytes
    ),
    "a host with too little memory": (memory_check(needed_gb=600), FAILURE, "give --split"),
    "memory in use": (memory_check(needed_gb=300, free_gb=100), WARNING, "end other programs"),
    "enough memory": (memory_check(needed_gb=300), OK, "300.0 GB of 400.0 GB of GPU"),
    "missing files": (
        [check_model(model(missing_bytes=300 * GB), DOWNLOAD_COMMAND)],
        WARNING,
        f"`{DOWNLOAD_COMMAND}`",
    ),
    "a full disk": ([check_model(model(missing_bytes=1000 * GB), DOWNLOAD_COMMAND)], FAILURE, "900.0 GB free"),
    "a truncated file": ([check_model(model(problem="x is truncated"), DOWNLOAD_COMMAND)], FAILURE, "x is trunc"),
    "a wrong checksum": (
        [check_model(model(found={"a": "1", "b": "2"}, expected={"a": "1", "b": "3"}), DOWNLOAD_COMMAND)],
        FAILURE,
        "b in /models/k2 is not what the Hub has",
    ),
    "right checksums": (
        [check_model(model(found={"a": "1"}, expected={"a": "1"}), DOWNLOAD_COMMAND)],
        OK,
        "1 of them right",
    ),
    "an address that is gone": (
        list(check_addresses(HOST, facts(interfaces={"127.0.0.1": "lo0", "169.254.1.2": "en5"}))),
        FAILURE,
        r"192.168.0.2 is on none of its interfaces that are up \(169.254.1.2 on en5\)",
    ),
    "the right addresses": (list(check_addresses(HOST, FACTS)), OK, "192.168.0.2 on en5"),
    "jaccl on an old macOS": (
        jaccl_check(facts(backends=("ring",)), "macOS 15.5"),
        FAILURE,
        "update macOS 15.5 to macOS 26.2",
    ),
    "RDMA off": (
        jaccl_check(tool_output(rdma_ctl="disabled\n")),
        FAILURE,
        "Recovery and run `rdma_ctl enable`",
    ),
    "no RDMA device": (jaccl_check(tool_output(ibv_devices=NO_DEVICES)), FAILURE, "it has none"),
    "the bridge": (
        jaccl_check(tool_output(bridge0=BRIDGE.format(status="active"))),
        FAILURE,
        "`sudo networksetup",
    ),
    "small RDMA": (jaccl_check(FACTS, "macOS 26.2"), WARNING, "update to macOS 26.3"),
    "RDMA": (jaccl_check(FACTS), OK, "jaccl over rdma_en5"),
    "fast synch on the host": (
        [check_environment(facts(environment={"MLX_METAL_FAST_SYNCH": "1"}), ())],
        WARNING,
        "`unset MLX_METAL_FAST_SYNCH`",
    ),
    "fast synch in the hostfile": (
        [check_environment(FACTS, ("MLX_METAL_FAST_SYNCH=1",))],
        WARNING,
        "take it out of envs",
    ),
    "idle sleep": (list(check_sleep(FACTS)), WARNING, "`sudo pmset -a sleep 0 disksleep 0`"),
    "a slow answer": (
        list(check_answer(round_trip_s=0.05, clock_ahead_s=0.0))[:1],  # without the check of the clock
        WARNING,
        "answers in 50.0 ms",
    ),
    "a wrong clock": (
        list(check_answer(round_trip_s=0.001, clock_ahead_s=-90.0))[1:],
        WARNING,
        "90 s behind .* `sudo sntp",
    ),
    "a slow hop": ([check_hop(HopSpeed(latency_s=0.0002, bytes_per_s=60e6))], WARNING, "ips are those of the cable"),
    "a fast hop": ([check_hop(HopSpeed(latency_s=0.0003, bytes_per_s=4e9))], OK, "300 us for a token, 4.00 GB/s"),
}
"""One check, its expected result, and a pattern of its message."""


@follows_advice(
    "set it: `sudo sntp -sS time.apple.com` there; logs will not match, nothing else depends on it",
    "mlx 1: install what this machine has: `python3 -m pip install mlx==1`",
    "give --split, a smaller --context or another host",
    "run `sudo sysctl iogpu.wired_limit_mb=1` there, or give --split",
    "a in b is not what the Hub has: remove it and run `mlx-k2 download`",
    "remove it and copy it again",
    "a: correct the hostfile, or let `mlx.distributed_config --over thunderbolt --auto-setup` set the addresses, "
    "which a restart undoes",
    'its mlx has no jaccl: write "backend": "ring" in the hostfile',
    "RDMA is off: start this Mac in Recovery and run `rdma_ctl enable` in its Terminal (not over ssh)",
    "so let `mlx.distributed_config` write the hostfile again; Thunderbolt 4 has none",
    "`sudo networksetup -setnetworkserviceenabled 'Thunderbolt Bridge' off` there",
    "the hostfile sets A, which can wedge a GPU until it is restarted: take it out of envs",
    "A is set there, which can wedge a GPU until it is restarted: `unset A`",
    "a: `sudo pmset -a sleep 0 disksleep 0` there",
)
@pytest.mark.parametrize(("checks", "result", "pattern"), CASES.values(), ids=CASES)
def test_each_state_of_a_host_gives_the_right_result_and_advice(
    checks: list[Check], result: CheckResult, pattern: str
) -> None:
    (check,) = checks
    assert check.result is result
    assert re.search(pattern, check.message), check.message
    if "`" in pattern and result is not OK:  # the advice is a command
        assert check.commands


def test_a_host_without_pmset_has_no_check_of_its_sleep() -> None:
    assert list(check_sleep(facts(settings={}))) == []


def test_where_copies_of_a_file_differ_both_of_two_hosts_fail_and_of_three_the_one_with_the_other_copy() -> None:
    copies = {"mac-1": model(found={"a": "1", "b": "2"}), "mac-2": model(found={"b": "3", "c": "4"})}
    assert [(check.host, check.result) for check in check_copies(copies)] == [("mac-1", FAILURE), ("mac-2", FAILURE)]
    with_majority = copies | {"mac-3": model(found={"b": "2"})}
    assert [check.host for check in check_copies(with_majority)] == ["mac-2"]


def test_the_commands_of_a_check_that_failed_are_the_texts_between_backticks() -> None:
    check = Check("ssh", FAILURE, "its key is unknown: run `ssh mac-2` once, then `ssh-copy-id mac-2`")
    assert check.commands == ["ssh mac-2", "ssh-copy-id mac-2"]
    assert replace(check, result=OK).commands == []
