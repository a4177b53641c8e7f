"""Tests of what commands log before they start stages."""

import json
from pathlib import Path

import pytest

from mlx_k2.cli.main import run


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (("generate", "--dry-run"), 0),
        (("bench", "--prompt-lengths", "999999"), 2),  # longer than the context, so that no stage is started
        (("download",), 2),  # the built-in model is not downloaded
        (("serve", "--print-settings", "opencode"), 0),
    ],
    ids=["generate", "bench", "download", "serve"],
)
def test_each_command_warns_of_unknown_keys_in_the_hostfile(
    arguments: tuple[str, ...], exit_code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostfile = tmp_path / "hosts.json"
    hostfile.write_text(json.dumps([{"ssh": "127.0.0.1", "memory": 8}]))
    assert run([*arguments, "--hostfile", str(hostfile)]) == exit_code
    assert "hosts.json: host 0 (127.0.0.1): ignored unknown keys: memory\n" in capsys.readouterr().err
