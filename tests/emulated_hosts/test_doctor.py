"""Tests of the doctor over real ssh on three hosts with one problem each: one run finds all, with remedies."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.launch.ssh import WHEEL
from tests.emulated_hosts.hosts import EmulatedHosts
from tests.emulated_hosts.test_generate import MLX_K2
from tests.local_cluster import write_model

pytestmark = pytest.mark.slow

Line = dict[str, Any]


def doctor(hosts: EmulatedHosts, *options: str) -> tuple[int, list[Line], str]:
    """Run `mlx-k2 doctor --json` on host 0. Return its exit code, lines and stderr."""
    command = [MLX_K2, "doctor", "--json", *options]
    process = hosts.exec(0, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reported, err = process.communicate(timeout=100)
    return process.returncode, [json.loads(line) for line in reported.splitlines()], err.decode()


def found(lines: list[Line], host: str, check: str) -> Line:
    (line,) = [line for line in lines if (line.get("host"), line.get("check")) == (host, check)]
    return line


def test_the_doctor_checks_everything_and_finds_each_hosts_problem(
    emulated_hosts: EmulatedHosts, tmp_path: Path
) -> None:
    hosts = emulated_hosts
    model = write_model(tmp_path / "model")
    good = [{"ssh": name, "ips": [address]} for name, address in zip(hosts.names, hosts.addresses, strict=True)]
    hostfile = tmp_path / "hosts.json"

    own = [{**host, "model": str(shutil.copytree(model, tmp_path / f"model on {host['ssh']}"))} for host in good]
    hostfile.write_text(json.dumps(own))
    code, lines, err = doctor(hosts, "--hostfile", str(hostfile), "--model", str(model), "--deep")
    assert code == 0, (lines, err)
    assert {line["result"] for line in lines[:-1]} <= {"ok", "warning"}
    for name in hosts.names:
        for check in ("ssh", "clock", "versions", "system", "memory", "model", "addresses", "backend", "environment"):
            found(lines, name, check)
    assert [line["host"] for line in lines if line.get("check") == "hop"] == ["host-0 to host-1", "host-1 to host-2"]
    assert "not compared: none was known before" in found(lines, "host-2", "model")["found"]

    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    last = sorted(broken.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1000])
    bad = [
        good[0] | {"ips": ["10.77.0.99"]},
        good[1] | {"python": "/nowhere/python"},
        good[2] | {"model": str(broken)},
    ]
    hostfile.write_text(json.dumps({"hosts": bad, "envs": ["MLX_METAL_FAST_SYNCH=1"]}))
    code, lines, err = doctor(hosts, "--hostfile", str(hostfile), "--model", str(model))
    assert code == 1, err
    assert "10.77.0.99 is on none of its interfaces" in found(lines, "host-0", "addresses")["found"]
    assert found(lines, "host-1", "ssh")["commands"] == [
        "make dist",
        f"scp dist/{WHEEL} host-1:",
        f"ssh host-1 python3 -m pip install ./{WHEEL}",
    ]
    assert "is truncated: 1000 of its" in found(lines, "host-2", "model")["found"]
    assert found(lines, "host-2", "environment")["result"] == "warning"
    assert found(lines, "all hosts", "hop")["found"] == "not measured: not every host answered"
    failed = {(line["host"], line["check"]) for line in lines[:-1] if line["result"] == "failure"}
    assert failed == {("host-0", "addresses"), ("host-1", "ssh"), ("host-2", "model")}
    assert lines[-1]["summary"]["failure"] == 3
    assert hosts.all_processes() == {}


def test_the_doctors_table_repeats_each_problem_on_a_full_line(emulated_hosts: EmulatedHosts, tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts.json"
    entries = [{"ssh": "host-0", "ips": ["10.77.0.1"]}, {"ssh": "refused-key", "ips": ["10.77.0.2"]}]
    hostfile.write_text(json.dumps(entries))
    command = [MLX_K2, "doctor", "--hostfile", str(hostfile)]
    process = emulated_hosts.exec(0, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reported, err = process.communicate(timeout=60)
    assert (process.returncode, reported) == (1, b"")
    assert "refused-key, ssh: it refused this user's key: run `ssh-copy-id refused-key`" in err.decode()
    assert "1 failure" in err.decode()
