"""Tests of faults found after stages start: an error names stage and host, the exit code is 1, no process is left."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from mlx_k2.cli.main import run
from mlx_k2.weights.manifest import HubFile, write_manifest
from tests.advice import follows_advice
from tests.cli.command import CommandLine
from tests.cli.linked_model import link_model, replace_file
from tests.local_cluster import still_running_after
from tests.model.checkpoints import copy_with_value
from tests.processes import started_processes

FailingRun = Callable[..., str]


@pytest.fixture
def error_on(endless_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[FailingRun]:
    """Yield a function that runs generate, which must fail, with one stage on each of ``hosts``.

    ``hosts`` are changes of hostfile entries for this machine. The function returns the only line of output; lines
    about a stage that takes long to end are left out.
    """

    def run_on(*hosts: dict[str, object], envs: tuple[str, ...] = ()) -> str:
        entries = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"], **host} for host in hosts]
        hostfile = tmp_path / "hosts.json"
        hostfile.write_text(json.dumps({"hosts": entries, "envs": envs}))
        assert run(["generate", "--hostfile", str(hostfile), "--model", str(endless_model), "Hello"]) == 1
        output = capsys.readouterr()
        assert output.out == ""
        (line,) = [line for line in output.err.splitlines() if not line.startswith("waiting for stage")]
        return line

    yield run_on
    assert still_running_after(started_processes(), 0) == []


def test_a_stage_whose_python_is_missing_is_named_with_the_path(error_on: FailingRun) -> None:
    line = error_on({"python": "/nowhere/python"})
    assert line.startswith("error: stage 0 on this machine did not start: /nowhere/python cannot be started here")


def test_the_hostfiles_envs_are_set_before_a_stages_python_starts(error_on: FailingRun) -> None:
    line = error_on({}, envs=("PYTHONHASHSEED=no number",))  # Python refuses to start with it
    assert line.startswith("error: stage 0 on this machine (starting) ended with exit code 1")


def test_stages_with_different_models_are_both_named(error_on: FailingRun, endless_model: Path, tmp_path: Path) -> None:
    other = link_model(endless_model, tmp_path / "other")
    fields = json.loads((endless_model / "config.json").read_bytes()) | {"rms_norm_eps": 1e-6}
    replace_file(other / "config.json", json.dumps(fields).encode())
    line = error_on({}, {"model": str(other)})
    assert line.startswith("error: the model on this machine (stage 1) is not the one on this machine (stage 0): their")


def test_a_port_in_use_is_named(error_on: FailingRun) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        line = error_on({"ips": [address]}, {})
    assert line.startswith(f"error: stage 0 on this machine: cannot listen on {address}: Address already in use")


NAN = 0x7FC0
"""NaN as the bits of a bfloat16."""
FIRST_SHARD, THIRD_SHARD = (f"model-0000{number}-of-000008.safetensors" for number in (1, 3))


@pytest.mark.slow
def test_nan_in_a_step_gives_no_token_names_stage_and_layer_and_is_restarted_once(
    command_line: CommandLine, endless_model: Path, tmp_path: Path
) -> None:
    model = copy_with_value(endless_model, tmp_path / "nan", "model.layers.5.self_attn.o_proj.weight", NAN)
    result = command_line.run("generate", "--model", str(model), "--stages", "2", "--max-tokens", "20", "Hello")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("all stages start again") == 1
    error = result.stderr.splitlines()[-1]
    assert re.match(
        r"error: stage 1 on this machine: NaN or infinity in step \d+, first in layer 5: its weights", error
    )
    assert error.endswith("(given up after 1 restarts)")


def test_nan_in_a_norm_is_found_while_loading(error_on: FailingRun, endless_model: Path, tmp_path: Path) -> None:
    model = copy_with_value(endless_model, tmp_path / "nan", "model.layers.5.input_layernorm.weight", NAN)
    line = error_on({"model": str(model)})
    assert re.search(r"error: stage 0 on this machine: .*: model.layers.5.input_layernorm.weight has NaN or inf", line)


@pytest.mark.slow
def test_check_weights_finds_nan_while_loading(command_line: CommandLine, endless_model: Path, tmp_path: Path) -> None:
    model = copy_with_value(endless_model, tmp_path / "nan", "model.layers.5.self_attn.o_proj.weight", NAN)
    result = command_line.run("generate", "--model", str(model), "--check-weights", "Hello")
    assert (result.returncode, result.stdout) == (1, "")
    assert "o_proj.weight has NaN or infinity: fetch the file again" in result.stderr


def copy_with_changed_byte(model: Path, folder: Path, name: str) -> Path:
    """Return ``folder`` with a copy of a model whose file ``name`` has another last byte."""
    link_model(model, folder)
    data = bytearray((model / name).read_bytes())
    data[-1] ^= 1
    replace_file(folder / name, data)
    return folder


def add_manifest(folder: Path) -> None:
    """Write the manifest of a folder with the sizes and digests that its weight files have now."""
    entries = {
        file.name: HubFile(file.stat().st_size, sha256(file.read_bytes()).hexdigest())
        for file in folder.glob("*.safetensors")
    }
    write_manifest(folder, entries)


@follows_advice(
    "a on b (stage 1) is not the one on c (stage 0): fetch the same revision on both",
    "differ; fetch the same revision on both",
    "differ; give the same --model and --revision for both",
)
@pytest.mark.slow
def test_a_file_that_differs_between_two_manifests_is_an_error_even_if_only_one_host_reads_it(
    error_on: FailingRun, endless_model: Path, tmp_path: Path
) -> None:
    changed = copy_with_changed_byte(endless_model, tmp_path / "changed", FIRST_SHARD)
    original = link_model(endless_model, tmp_path / "original")
    for folder in (changed, original):
        add_manifest(folder)
    line = error_on({"model": str(changed)}, {"model": str(original)})
    assert line == (
        f"error: {FIRST_SHARD} on this machine (stage 1) is not the one on this machine (stage 0): "
        "fetch the same revision on both"
    )


def test_a_file_that_differs_from_the_manifest_is_named(
    error_on: FailingRun, endless_model: Path, tmp_path: Path
) -> None:
    folder = copy_with_changed_byte(endless_model, tmp_path / "model", THIRD_SHARD)
    add_manifest(folder)
    (folder / THIRD_SHARD).write_bytes((endless_model / THIRD_SHARD).read_bytes())
    line = error_on({"model": str(folder)})
    assert (
        f"{THIRD_SHARD} is not the file that mlx-k2-manifest.json describes: a damaged copy, or another revision"
        in line
    )


@pytest.mark.slow
def test_the_doctor_compares_files_with_the_manifest_that_its_deep_check_has_written(
    command_line: CommandLine, endless_model: Path, tmp_path: Path
) -> None:
    folder = copy_with_changed_byte(endless_model, tmp_path / "model", THIRD_SHARD)

    def model_finding(*options: str) -> str:
        """Return doctor's finding about the model without its first part, the number of files and their folder."""
        output = command_line.run("doctor", "--stages", "1", "--model", str(folder), "--json", *options).stdout
        checks = [json.loads(line) for line in output.splitlines()]
        finding: str = next(check["found"] for check in checks if check.get("check") == "model")
        return finding.partition(", ")[2]

    assert model_finding() == "not compared"
    assert model_finding("--deep") == "not compared: none was known before"
    assert model_finding("--deep") == "8 of them right by their checksums"
    (folder / THIRD_SHARD).write_bytes((endless_model / THIRD_SHARD).read_bytes())
    result = command_line.run("doctor", "--stages", "1", "--model", str(folder))
    assert result.returncode == 1
    assert f"{THIRD_SHARD} is not the file that" in result.stdout + result.stderr
