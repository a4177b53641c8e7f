"""Tests of what setup writes and refuses without any host. tests/emulated_hosts/test_setup.py has the rest."""

import json
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.cli.main import run
from mlx_k2.cli.profile import with_value

LINES = st.lists(
    st.sampled_from(
        ["", "# a comment", 'model = "a"', 'hostfile = "b"', "seed = 1", "[chat]", 'hostfile = "c"', "  [serve]"]
    ),
    max_size=8,
)


@given(lines=LINES, value=st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=10))
def test_a_value_is_set_and_nothing_else_changes(lines: list[str], value: str) -> None:
    text = "\n".join(lines)
    try:
        before = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return  # a key or a table twice
    after = tomllib.loads(with_value(text, "hostfile", value))
    assert after == before | {"hostfile": value}
    assert with_value(with_value(text, "hostfile", value), "hostfile", value) == with_value(text, "hostfile", value)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("MLX_K2_CONFIG")
    return tmp_path / "mlx-k2"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nobody can be asked here: name the hosts, and give --yes"),
        (["this", "localhost"], "give each Mac once"),
        (["--", "-oProxyCommand=x"], "'-oProxyCommand=x' is not a host name that ssh accepts"),
        (["this"], "nobody can be asked here"),
        (["this", "--wheels", "/nowhere"], "--wheels /nowhere: there is no wheel in such a folder"),
    ],
)
def test_a_set_up_that_cannot_be_done_changes_nothing(
    arguments: list[str], words: str, settings: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["setup", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not settings.exists()


def test_this_machine_alone_needs_no_ssh(settings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings.mkdir()
    (settings / "config.toml").write_text("# mine\nseed = 3\n[chat]\nseed = 4\n")
    (settings / "hosts.json").write_text('[{"ssh": "127.0.0.1", "memory_gb": 8}]')
    assert run(["setup", "this", "--yes", "--model", "built-in"]) == 0
    profile = tomllib.loads((settings / "config.toml").read_text())
    assert profile == {
        "model": "built-in",
        "hostfile": str(settings / "hosts.json"),
        "seed": 3,
        "chat": {"seed": 4},
    }
    assert "# mine" in (settings / "config.toml").read_text()
    assert json.loads((settings / "hosts.json").read_text()) == [{"ssh": "127.0.0.1", "memory_gb": 8.0}]
    assert "0 failure" in capsys.readouterr().err
    assert run(["setup", "this", "--yes"]) == 0
    assert "written" not in capsys.readouterr().err
