"""Tests of `mlx-k2 doctor` over real ssh on three hosts: without a problem, and with one problem on each host."""

import json
import os
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
"""One JSON object that the doctor writes: a check, or last the summary."""


def run_doctor(hosts: EmulatedHosts, *options: str) -> tuple[int, list[Line], str]:
    """Run `mlx-k2 doctor --json` on host 0; return its exit code, the lines of its stdout, and its stderr."""
    command = [MLX_K2, "doctor", "--json", *options]
    process = hosts.exec(0, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=100)
    return process.returncode, [json.loads(line) for line in stdout.splitlines()], stderr.decode()


def line_of(lines: list[Line], host: str, check: str) -> Line:
    (line,) = [line for line in lines if (line.get("host"), line.get("check")) == (host, check)]
    return line


def test_on_hosts_without_a_problem_the_doctor_passes_every_check(
    emulated_hosts: EmulatedHosts, tmp_path: Path
) -> None:
    hosts = emulated_hosts
    model = write_model(tmp_path / "model")
    entries = [
        {"ssh": name, "ips": [address], "model": str(shutil.copytree(model, tmp_path / f"model on {name}"))}
        for name, address in zip(hosts.names, hosts.addresses, strict=True)
    ]
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps(entries))
    code, lines, stderr = run_doctor(hosts, "--hostfile", str(hostfile), "--model", str(model), "--deep")
    assert code == 0, (lines, stderr)
    assert {line["result"] for line in lines[:-1]} <= {"ok", "warning"}
    for name in hosts.names:
        for check in ("ssh", "clock", "versions", "system", "memory", "model", "addresses", "backend", "environment"):
            line_of(lines, name, check)
    assert [line["host"] for line in lines if line.get("check") == "hop"] == ["host-0 to host-1", "host-1 to host-2"]
    assert "not compared: none was known before" in line_of(lines, "host-2", "model")["found"]
    assert hosts.all_processes() == {}


def test_one_run_of_the_doctor_finds_the_problem_of_each_host(emulated_hosts: EmulatedHosts, tmp_path: Path) -> None:
    hosts = emulated_hosts
    model, truncated_model = write_model(tmp_path / "model"), tmp_path / "truncated"
    shutil.copytree(model, truncated_model)
    shard = max(truncated_model.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1000)
    entries = [
        {"ssh": "host-0", "ips": ["10.77.0.99"]},
        {"ssh": "host-1", "ips": [hosts.addresses[1]], "python": "/nowhere/python"},
        {"ssh": "host-2", "ips": [hosts.addresses[2]], "model": str(truncated_model)},
    ]
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps({"hosts": entries, "envs": ["MLX_METAL_FAST_SYNCH=1"]}))
    code, lines, stderr = run_doctor(hosts, "--hostfile", str(hostfile), "--model", str(model))
    assert code == 1, stderr
    assert "10.77.0.99 is on none of its interfaces" in line_of(lines, "host-0", "addresses")["found"]
    assert line_of(lines, "host-1", "ssh")["commands"] == [
        "make dist",
        f"scp dist/{WHEEL} host-1:",
        f"ssh host-1 python3 -m pip install ./{WHEEL}",
    ]
    assert "is truncated: 1000 of its" in line_of(lines, "host-2", "model")["found"]
    assert line_of(lines, "host-2", "environment")["result"] == "warning"
    assert line_of(lines, "all hosts", "hop")["found"] == "not measured: not every host answered"
    failures = {(line["host"], line["check"]) for line in lines[:-1] if line["result"] == "failure"}
    assert failures == {("host-0", "addresses"), ("host-1", "ssh"), ("host-2", "model")}
    assert lines[-1]["summary"]["failure"] == 3
    assert hosts.all_processes() == {}


def test_the_table_of_the_doctor_repeats_each_problem_on_a_full_line(
    emulated_hosts: EmulatedHosts, tmp_path: Path
) -> None:
    hostfile = tmp_path / "hosts.json"
    entries = [{"ssh": "host-0", "ips": ["10.77.0.1"]}, {"ssh": "refused-key", "ips": ["10.77.0.2"]}]
    hostfile.write_text(json.dumps(entries))
    command = [MLX_K2, "doctor", "--hostfile", str(hostfile)]
    process = emulated_hosts.exec(0, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (1, b"")
    assert "refused-key, ssh: it refused this user's key: run `ssh-copy-id refused-key`" in stderr.decode()
    assert "1 failure" in stderr.decode()
