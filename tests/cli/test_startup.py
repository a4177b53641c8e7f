"""Tests of --help and --version, which import no heavy module, and of --dry-run, which starts no process.

Also of the error about a missing package for a SOCKS proxy.
"""

import json
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import pytest

from mlx_k2 import __version__
from mlx_k2.cli.main import run
from mlx_k2.http_reason import http_reason
from tests.advice import follows_advice
from tests.cli.command import CommandLine

HEAVY_MODULES = ("mlx", "mlx_lm", "transformers", "numpy", "rich", "tiktoken", "jinja2", "huggingface_hub")
LIST_HEAVY_IMPORTS = """
import sys
from mlx_k2.cli.main import run
assert run(sys.argv[2:]) == 0
sys.exit(", ".join(name for name in sys.argv[1].split(",") if name in sys.modules))
"""


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_heavy_module(option: str) -> None:
    command = [sys.executable, "-c", LIST_HEAVY_IMPORTS, ",".join(HEAVY_MODULES), option]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.stderr.strip() == ""
    assert result.stdout


def test_the_import_of_generate_imports_neither_mlx_nor_transformers() -> None:
    code = "import sys, mlx_k2.cli.generate; sys.exit('mlx' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_version_prints_the_versions_of_mlx_k2_and_mlx(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"mlx-k2 {__version__} (mlx {version('mlx')})\n"


def test_help_lists_the_commands_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    assert run(["generate", "--help"]) == 0
    assert "130 after Ctrl-C" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_shows_the_plan_and_starts_no_process(
    endless_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", fail)
    assert run(["generate", "--dry-run", "--model", str(endless_model), "--stages", "2", "--split", "5,2"]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    headings, first, second, *_ = output.err.splitlines()
    assert headings.split("  ")[0] == "stage"
    assert first.split()[:3] == ["0", "127.0.0.1", "0-4"]
    assert second.split()[:3] == ["1", "127.0.0.1", "5-6"]
    assert "stage 1 opens model-{00006..00008}-of-000008.safetensors" in output.err
    assert re.search(r"^fits: [\d.]+ of [\d.]+ GB$", output.err, re.MULTILINE)
    assert "nothing was started" in output.err


def test_a_dry_run_without_a_local_model_asks_for_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text('[{"ssh": "mac-1", "ips": ["10.0.0.1"]}]')
    assert run(["generate", "--dry-run", "--hostfile", str(hostfile), "--model", "/models/k2"]) == 2
    error = "a dry run reads the model on this machine: /models/k2 does not exist: give the folder of a checkpoint"
    assert error in capsys.readouterr().err


@follows_advice(
    "needs 616.1 GB: run `mlx-k2 doctor --hostfile two-macs.json` to ask the hosts whether it fits",
)
def test_a_dry_run_of_kimi_k2_thinking_needs_no_network_and_proposes_a_doctor_command_that_asks_the_hosts(
    command_line: CommandLine, tmp_path: Path
) -> None:
    hostfile = tmp_path / "two-macs.json"
    hostfile.write_text('[{"ssh": "mac-1", "ips": ["192.168.0.1"]}, {"ssh": "mac-2", "ips": ["192.168.0.2"]}]')
    arguments = ("generate", "--dry-run", "--hostfile", str(hostfile), "--model", "moonshotai/Kimi-K2-Thinking")
    dry_run = command_line.run(*arguments, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert dry_run.returncode == 0
    assert "this plan uses the layout of moonshotai/Kimi-K2-Thinking that mlx-k2 has built in" in dry_run.stderr
    assert "stage 1 opens model-{00033..00062}-of-000062.safetensors" in dry_run.stderr
    assert "one stream without draft tokens: at most 21.0 tok/s, at 692 GB/s of memory bandwidth" in dry_run.stderr
    advice = re.search("needs 616.1 GB: run `mlx-k2 (.*)` to ask the hosts whether it fits", dry_run.stderr)
    assert advice is not None
    doctor = command_line.run(*shlex.split(advice[1]), HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path))
    assert {"mac-1", "mac-2"} <= set(doctor.stderr.split()), doctor


def test_a_dry_run_uses_the_memory_and_the_bandwidth_of_the_hostfile(command_line: CommandLine, tmp_path: Path) -> None:
    hosts = [
        {"ssh": f"mac-{number}", "ips": [f"192.168.0.{number}"], "memory_gb": 480, "gb_per_s": 800} for number in (1, 2)
    ]
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps(hosts))
    arguments = ("generate", "--dry-run", "--hostfile", str(hostfile), "--model", "moonshotai/Kimi-K2-Thinking")
    plan = command_line.run(*arguments, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path)).stderr
    assert "fits: 631 of 960 GB" in plan.splitlines()
    assert "325.9 GB of 480.0 GB" in plan
    assert "one stream without draft tokens: at most 24.3 tok/s, at 800 GB/s of memory bandwidth" in plan.splitlines()


def test_the_error_about_a_missing_socks_package_gives_the_command_for_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    reason = http_reason(ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."))
    python, *arguments = shlex.split(reason.split("`")[1])
    assert python == sys.executable
    assert arguments == ["-m", "pip", "install", "socksio"]
