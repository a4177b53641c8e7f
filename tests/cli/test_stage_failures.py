"""Tests of faults found after stages start: one line names stage and host, exit code 1, no process is left."""

import json
import re
import socket
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from mlx_k2.cli.main import run
from mlx_k2.weights.manifest import HubFile, write_manifest
from tests.advice import follows_advice
from tests.cli.command import CommandLine
from tests.local_cluster import wait_until_gone
from tests.model.checkpoints import copy_with_value
from tests.processes import started_processes


@pytest.fixture
def failure(endless: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator["Failure"]:
    yield Failure(endless, tmp_path / "hosts.json", capsys)
    assert wait_until_gone(started_processes(), 0) == []


class Failure:
    """A runner of `mlx-k2 generate` that must fail."""

    def __init__(self, model: Path, hostfile: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._model = model
        self._hostfile = hostfile
        self._capsys = capsys

    def over(self, *hosts: dict[str, object], envs: tuple[str, ...] = ()) -> str:
        entries = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"], **host} for host in hosts]
        self._hostfile.write_text(json.dumps({"hosts": entries, "envs": envs}))
        assert run(["generate", "--hostfile", str(self._hostfile), "--model", str(self._model), "Hello"]) == 1
        reported = self._capsys.readouterr()
        assert reported.out == ""
        (line,) = reported.err.splitlines()
        return line


def test_a_stage_whose_python_is_missing_is_named_with_the_path(failure: Failure) -> None:
    line = failure.over({"python": "/nowhere/python"})
    assert line.startswith("error: stage 0 on this machine did not start: /nowhere/python cannot be started here")


def test_the_hostfiles_envs_are_set_before_a_stages_python_starts(failure: Failure) -> None:
    line = failure.over({}, envs=("PYTHONHASHSEED=no number",))  # Python refuses to start with it
    assert line.startswith("error: stage 0 on this machine (starting) ended with exit code 1")


def test_stages_with_different_models_are_both_named(failure: Failure, endless: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in endless.iterdir():
        (other / file.name).symlink_to(file)
    (other / "config.json").unlink()
    fields = json.loads((endless / "config.json").read_bytes()) | {"rms_norm_eps": 1e-6}
    (other / "config.json").write_text(json.dumps(fields))
    line = failure.over({}, {"model": str(other)})
    assert line.startswith("error: the model on this machine (stage 1) is not the one on this machine (stage 0): their")


def test_a_port_in_use_is_named(failure: Failure) -> None:
    with socket.create_server(("127.0.0.1", 0)) as received:
        address = f"127.0.0.1:{received.getsockname()[1]}"
        line = failure.over({"ips": [address]}, {})
    assert line.startswith(f"error: stage 0 on this machine: cannot listen on {address}: Address already in use")


NAN = 0x7FC0


@pytest.mark.slow
def test_nan_in_a_step_gives_no_token_names_stage_and_layer_and_is_restarted_once(
    command_line: CommandLine, endless: Path, tmp_path: Path
) -> None:
    model = copy_with_value(endless, tmp_path / "nan", "model.layers.5.self_attn.o_proj.weight", NAN)
    done = command_line.run("generate", "--model", str(model), "--stages", "2", "--max-tokens", "20", "Hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("all stages start again") == 1
    error = done.stderr.splitlines()[-1]
    assert re.match(
        r"error: stage 1 on this machine: NaN or infinity in step \d+, first in layer 5: its weights", error
    )
    assert error.endswith("(given up after 1 restarts)")


def test_nan_in_a_norm_is_found_while_loading(failure: Failure, endless: Path, tmp_path: Path) -> None:
    model = copy_with_value(endless, tmp_path / "nan", "model.layers.5.input_layernorm.weight", NAN)
    line = failure.over({"model": str(model)})
    assert re.search(r"error: stage 0 on this machine: .*: model.layers.5.input_layernorm.weight has NaN or inf", line)


@pytest.mark.slow
def test_check_weights_finds_nan_in_a_matrix_while_loading(
    command_line: CommandLine, endless: Path, tmp_path: Path
) -> None:
    model = copy_with_value(endless, tmp_path / "nan", "model.layers.5.self_attn.o_proj.weight", NAN)
    done = command_line.run("generate", "--model", str(model), "--check-weights", "Hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert "o_proj.weight has NaN or infinity: fetch the file again" in done.stderr


def copied(folder: Path, copy: Path, name: str) -> Path:
    """Return a copy of a model with the same config and index, and with another last byte in its file ``name``."""
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).symlink_to(file)
    data = bytearray((folder / name).read_bytes())
    data[-1] ^= 1
    (copy / name).unlink()
    (copy / name).write_bytes(data)
    return copy


def manifest_of(folder: Path) -> None:
    files = folder.glob("*.safetensors")
    write_manifest(folder, {f.name: HubFile(f.stat().st_size, sha256(f.read_bytes()).hexdigest()) for f in files})


@follows_advice(
    "a on b (stage 1) is not the one on c (stage 0): fetch the same revision on both",
    "differ; fetch the same revision on both",
    "differ; give the same --model and --revision for both",
)
@pytest.mark.slow
def test_hosts_with_different_revisions_of_a_file_are_named_although_each_reads_other_files(
    failure: Failure, endless: Path, tmp_path: Path
) -> None:
    name = "model-00001-of-000008.safetensors"
    ours, theirs = (copied(endless, tmp_path / folder, name) for folder in ("ours", "theirs"))
    (theirs / name).write_bytes((endless / name).read_bytes())
    for folder in (ours, theirs):
        manifest_of(folder)
    line = failure.over({"model": str(ours)}, {"model": str(theirs)})
    assert line == (
        f"error: {name} on this machine (stage 1) is not the one on this machine (stage 0): "
        "fetch the same revision on both"
    )


def test_a_file_that_its_manifest_does_not_describe_is_named(failure: Failure, endless: Path, tmp_path: Path) -> None:
    name = "model-00003-of-000008.safetensors"
    folder = copied(endless, tmp_path / "model", name)
    manifest_of(folder)
    (folder / name).write_bytes((endless / name).read_bytes())
    line = failure.over({"model": str(folder)})
    assert f"{name} is not the file that mlx-k2-manifest.json describes: a damaged copy, or another revision" in line


@pytest.mark.slow
def test_the_doctor_reports_not_compared_until_it_has_written_a_manifest(
    command_line: CommandLine, endless: Path, tmp_path: Path
) -> None:
    name = "model-00003-of-000008.safetensors"
    folder = copied(endless, tmp_path / "model", name)
    found = []
    for options in ((), ("--deep",), ("--deep",)):
        done = command_line.run("doctor", "--stages", "1", "--model", str(folder), "--json", *options)
        checks = [json.loads(line) for line in done.stdout.splitlines()]
        found.append(next(check["found"] for check in checks if check.get("check") == "model"))
    assert [text.partition(", ")[2] for text in found] == [
        "not compared",
        "not compared: none was known before",
        "8 of them right by their checksums",
    ]
    (folder / name).write_bytes((endless / name).read_bytes())
    done = command_line.run("doctor", "--stages", "1", "--model", str(folder))
    assert done.returncode == 1
    assert f"{name} is not the file that" in done.stdout + done.stderr
