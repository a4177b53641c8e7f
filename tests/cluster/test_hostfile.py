"""Tests of hostfiles: the examples in hostfiles/, MLX's list and object forms, and the error about each invalid one."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.cluster.hostfile import Backend, Hostfile, local_hostfile, parse_hostfile, read_hostfile
from mlx_k2.errors import HostfileError

EXAMPLES = Path(__file__).parents[2] / "hostfiles"
EXPECTED_EXAMPLES = {
    "two-m3-ultras-ring.json": (2, Backend.RING, False),
    "four-m3-ultras-ring.json": (4, Backend.RING, False),
    "two-m3-ultras-jaccl.json": (2, Backend.JACCL, False),
    "four-m3-ultras-jaccl.json": (4, Backend.JACCL, False),
    "local-two-stages.json": (2, Backend.RING, True),
    "local-three-stages.json": (3, Backend.RING, True),
}
"""Number of hosts, backend, and whether all hosts are this machine."""

MAC_1: dict[str, Any] = {"ssh": "mac-1", "ips": ["192.168.0.1"]}
MAC_2: dict[str, Any] = {"ssh": "mac-2", "ips": ["192.168.0.2"]}


def parse(content: Any) -> Hostfile:
    return parse_hostfile(json.dumps(content).encode(), "macs.json")


def jaccl(first_devices: list[Any], second_devices: list[Any]) -> dict[str, Any]:
    """Return the content of a hostfile of two hosts with these RDMA devices."""
    return {"backend": "jaccl", "hosts": [MAC_1 | {"rdma": first_devices}, MAC_2 | {"rdma": second_devices}]}


@pytest.mark.parametrize(("name", "expected"), EXPECTED_EXAMPLES.items())
def test_each_example_hostfile_loads_without_warnings(name: str, expected: tuple[int, Backend, bool]) -> None:
    num_hosts, backend, is_local = expected
    hostfile = read_hostfile(EXAMPLES / name)
    assert (len(hostfile.hosts), hostfile.backend, hostfile.warnings) == (num_hosts, backend, ())
    assert all(host.is_local is is_local for host in hostfile.hosts)


def test_every_example_hostfile_is_tested() -> None:
    assert {path.name for path in EXAMPLES.glob("*.json")} == EXPECTED_EXAMPLES.keys()


def test_a_hostfile_in_list_form_uses_the_ring_backend() -> None:
    hostfile = parse([MAC_1, MAC_2])
    assert [host.ssh for host in hostfile.hosts] == ["mac-1", "mac-2"]
    assert hostfile.backend is Backend.RING


def test_the_ethernet_hostfile_of_mlx_distributed_config_loads() -> None:
    hosts = [host | {"rdma": []} for host in (MAC_1, MAC_2)]
    hostfile = parse({"backend": "", "envs": ["MLX_METAL_FAST_SYNCH=1"], "hosts": hosts})
    assert hostfile.backend is Backend.RING
    assert hostfile.envs == ("MLX_METAL_FAST_SYNCH=1",)
    assert hostfile.warnings == ()


def test_several_rdma_devices_between_two_hosts_are_read() -> None:
    hostfile = parse(jaccl([None, ["rdma_en2", "rdma_en3"]], [["rdma_en2", "rdma_en3"], None]))
    assert hostfile.hosts[0].rdma == (None, ("rdma_en2", "rdma_en3"))


def test_a_jaccl_ring_needs_devices_only_between_neighbours() -> None:
    rdma_of_hosts = [[None, "a", None, "b"], ["a", None, "b", None], [None, "a", None, "b"], ["a", None, "b", None]]
    hosts = [{"ssh": f"mac-{rank}", "ips": [f"10.0.0.{rank}"], "rdma": rdma} for rank, rdma in enumerate(rdma_of_hosts)]
    assert parse({"backend": "jaccl-ring", "hosts": hosts}).backend is Backend.JACCL_RING
    with pytest.raises(HostfileError, match=r"host 0 \(mac-0\): rdma\[2\] names no device towards host 2 \(mac-2\)"):
        parse({"backend": "jaccl", "hosts": hosts})


def test_the_keys_that_mlx_k2_adds_to_mlxs_format_are_read() -> None:
    keys = {"python": "/opt/k2/bin/python", "model": "/Volumes/k2", "memory_gb": 480, "gb_per_s": 819.0}
    host = parse([MAC_1 | keys]).hosts[0]
    assert (host.python, host.model, host.memory_gb, host.gb_per_s) == tuple(keys.values())


def test_unknown_keys_are_ignored_with_a_warning() -> None:
    hostfile = parse({"hosts": [MAC_1 | {"user": "me"}, MAC_2], "nick": 1})
    assert hostfile.warnings == (
        "macs.json: ignored unknown keys: nick",
        "macs.json: host 0 (mac-1): ignored unknown keys: user",
    )


def test_the_hosts_of_local_hostfile_are_this_machine_and_pass_the_checks_of_a_hostfile() -> None:
    hosts = local_hostfile(3).hosts
    assert len(hosts) == 3
    assert all(host.is_local for host in hosts)
    assert parse([{"ssh": host.ssh, "ips": host.ips} for host in hosts]).hosts == hosts


def test_a_single_host_needs_no_address() -> None:
    assert len(parse([{"ssh": "mac-1"}]).hosts) == 1
    assert len(parse({"backend": "jaccl", "hosts": [{"ssh": "mac-1"}]}).hosts) == 1


def test_the_error_about_a_missing_hostfile_names_its_path(tmp_path: Path) -> None:
    with pytest.raises(HostfileError, match=r"cannot read the hostfile .*none\.json: No such file"):
        read_hostfile(tmp_path / "none.json")


@pytest.mark.parametrize("data", [b"", b"hosts: mac-1", b"[", b"\xff\xfe"])
def test_a_hostfile_that_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(HostfileError, match=r"macs\.json is not JSON"):
        parse_hostfile(data, "macs.json")


@pytest.mark.parametrize("content", [[], {}, {"hosts": []}, {"hosts": {}}, 3, None, "mac-1"])
def test_a_hostfile_without_hosts_is_refused(content: Any) -> None:
    with pytest.raises(HostfileError, match=r"macs\.json lists no hosts: write for instance"):
        parse(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([MAC_1, "mac-2"], "host 1: expected an object"),
        ([MAC_1, {"ips": ["10.0.0.1"]}], "host 1: missing required field `ssh`"),
        ([MAC_1, {"ssh": 3}], r"host 1: ssh: expected text, got a whole number"),
        ([{"ssh": "-oProxyCommand=reboot", "ips": ["10.0.0.1"]}], "not a host name that ssh accepts"),
        ([{"ssh": ""}], "'' is not a host name that ssh accepts"),
        ([{"ssh": "mac 1"}], "'mac 1' is not a host name that ssh accepts"),
        ([{"ssh": "mac\n1"}], "not a host name that ssh accepts"),
        ([MAC_1, {"ssh": "mac-2"}], r"host 1 \(mac-2\) has no ips, which backend ring needs: add"),
        ([MAC_1, MAC_2 | {"ips": ["10.0.0.1", "10.0.0.2"]}], r"host 1 \(mac-2\) has 2 ips and host 0 \(mac-1\) has 1"),
        ([MAC_1 | {"ips": ["mac-1.local"]}, MAC_2], r"\(mac-1\): ips holds 'mac-1.local': give an IPv4 address"),
        ([MAC_1 | {"ips": ["fe80::1"]}, MAC_2], r"\(mac-1\): ips holds 'fe80::1': give an IPv4 address"),
        ([MAC_1 | {"ips": ["10.0.0.1:0"]}, MAC_2], "a port is a number from 1 to 65535"),
        ([MAC_1 | {"ips": ["10.0.0.1:"]}, MAC_2], "a port is a number from 1 to 65535"),
        ([MAC_1 | {"ips": ["10.0.0.1:65536"]}, MAC_2], "a port is a number from 1 to 65535"),
        (
            [MAC_1 | {"ips": ["10.0.0.1:7000"]}, MAC_2 | {"ips": ["10.0.0.1:7000"]}],
            r"host 1 \(mac-2\) lists 10\.0\.0\.1:7000, which host 0 \(mac-1\) has already: give each its own port",
        ),
        ([MAC_1 | {"memory_gb": 0}], r"\(mac-1\): memory_gb is 0: leave the key out"),
        ([MAC_1 | {"gb_per_s": -1}], r"\(mac-1\): gb_per_s is -1: leave the key out"),
        ([MAC_1 | {"python": ""}], r"\(mac-1\): python '' is not a path"),
        ({"backend": "mpi", "hosts": [MAC_1]}, "does not run over backend 'mpi': write one of ring, jaccl, jaccl-ring"),
        ({"backend": "nccl", "hosts": [MAC_1]}, "does not run over backend 'nccl'"),
        ({"backend": ["ring"], "hosts": [MAC_1]}, "does not run over backend"),
        ({"envs": {"A": "1"}, "hosts": [MAC_1]}, 'envs must be a list of lines like "NAME=value"'),
        ({"envs": ["A"], "hosts": [MAC_1]}, 'envs must be a list of lines like "NAME=value"'),
        (jaccl([None, "rdma_en2"], ["rdma_en2"]), r"host 1 \(mac-2\): rdma has 1 entries for 2 hosts"),
        (jaccl([None, "rdma_en2"], []), r"host 1 \(mac-2\): rdma has 0 entries for 2 hosts.*mlx.distributed_config"),
        (jaccl(["rdma_en2", None], [None, None]), r"host 0 \(mac-1\): rdma\[0\] is the host itself and must be null"),
        (jaccl([None, None], ["rdma_en2", None]), r"host 0 \(mac-1\): rdma\[1\] names no device towards host 1"),
        (jaccl([None, []], ["rdma_en2", None]), r"rdma\[1\] names no device"),
        (jaccl([None, 5], ["rdma_en2", None]), r"host 0 \(mac-1\): rdma\[1\]: expected text or a list or null"),
        ({"backend": "jaccl", "hosts": [{"ssh": "mac-1"}, MAC_2]}, r"host 0 \(mac-1\) has no ips: backend jaccl needs"),
    ],
)
def test_the_error_about_an_invalid_hostfile_names_the_file_and_the_reason(content: Any, reason: str) -> None:
    with pytest.raises(HostfileError, match=reason) as refused:
        parse(content)
    assert str(refused.value).startswith("macs.json")
