"""Tests of API keys: their file, and a server that requires them."""

import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import AuthenticationError, OpenAI

from mlx_k2.cli.main import run
from mlx_k2.errors import SetupError
from mlx_k2.server.api_keys import KeyRing, add_key, read_keys, remove_key
from tests.cli.command import CommandLine
from tests.server.http_client import WAIT_S
from tests.server.in_process import SteppedServer, stepped_server


def test_a_key_is_stored_as_a_digest_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "keys.json"
    key = add_key(path, "alice")
    assert key.startswith("mk2-")
    assert len(key) > 40
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [stored.name for stored in read_keys(path)] == ["alice"]


def test_a_running_server_sees_new_and_removed_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ring = KeyRing(path, is_required=False)
    assert ring.owner(None) == ""
    alice, bob = add_key(path, "alice"), add_key(path, "bob")
    assert (ring.owner(alice), ring.owner(bob), ring.owner(None), ring.owner("mk2-x")) == ("alice", "bob", None, None)
    remove_key(path, "alice")
    assert (ring.owner(alice), ring.owner(bob)) == (None, "bob")
    remove_key(path, "bob")
    assert ring.owner(bob) is None
    assert ring.owner(None) is None, "without any key left, the server requires none"


def test_a_changed_file_that_cannot_be_used_is_logged_once_and_read_again_when_it_can(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    alice, bob = add_key(path, "alice"), add_key(path, "bob")
    lines: list[str] = []
    ring = KeyRing(path, is_required=True, log=lines.append)
    remove_key(path, "alice")
    path.chmod(0o644)
    for _ in range(3):
        assert (ring.owner(alice), ring.owner(bob)) == ("alice", "bob")
    (line,) = lines
    assert "chmod 600" in line
    path.chmod(0o600)  # neither content nor inode nor modification time change
    assert (ring.owner(alice), ring.owner(bob)) == (None, "bob")


def test_keys_that_processes_add_at_once_are_all_stored(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    names = [f"user-{number}" for number in range(8)]
    code = "import sys, pathlib, mlx_k2.server.api_keys as keys; keys.add_key(pathlib.Path(sys.argv[1]), sys.argv[2])"
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in names]
    assert [process.wait(WAIT_S) for process in processes] == [0] * len(names)
    assert sorted(stored.name for stored in read_keys(path)) == names


def test_a_key_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="empty"):
        add_key(tmp_path / "keys.json", "")


@pytest.mark.parametrize("content", ["{", "[]", '{"keys": [{"name": 5}]}'])
def test_a_malformed_key_file_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(SetupError, match=r"keys\.json cannot be used"):
        read_keys(path)


def test_a_key_file_that_others_can_read_is_refused_with_the_command_that_fixes_it(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "alice")
    path.chmod(0o644)
    with pytest.raises(SetupError, match="chmod 600"):
        KeyRing(path, is_required=False)


def test_a_name_is_used_once_and_an_unknown_one_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    add_key(path, "alice")
    with pytest.raises(SetupError, match="already"):
        add_key(path, "alice")
    with pytest.raises(SetupError, match="no key"):
        remove_key(path, "bob")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def keys(key_file: Path) -> dict[str, str]:
    """Two keys by their names, made by the command."""
    user = CommandLine(key_file.parent)
    add = ("keys", "add", "--key-file", str(key_file))
    return {name: user.run(*add, name).stdout.strip() for name in ("alice", "bob")}


@pytest.fixture(scope="module")
def locked_server(key_file: Path, keys: dict[str, str]) -> Iterator[SteppedServer]:
    """A server that requires keys, since its file has some."""
    with stepped_server(keys=KeyRing(key_file, is_required=False)) as server:
        yield server


def test_the_command_lists_the_names_of_keys(
    key_file: Path, keys: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["keys", "list", "--key-file", str(key_file)]) == 0
    output = capsys.readouterr().out
    assert [line.split("\t")[0] for line in output.splitlines()] == ["alice", "bob"]
    assert not any(key in output for key in keys.values())


def test_the_official_client_uses_a_key_and_is_refused_with_a_wrong_one(
    locked_server: SteppedServer, keys: dict[str, str]
) -> None:
    base_url = f"{locked_server.url}/v1"
    assert OpenAI(base_url=base_url, api_key=keys["alice"], timeout=WAIT_S).models.list().data
    with pytest.raises(AuthenticationError) as caught:
        OpenAI(base_url=base_url, api_key="mk2-wrong", timeout=WAIT_S).models.list()
    assert caught.value.code == "invalid_api_key"


def test_every_path_but_health_needs_a_key(locked_server: SteppedServer, keys: dict[str, str]) -> None:
    for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/v1/status"), ("POST", "/tokenize")):
        answer = locked_server.request(method, path)
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.error["type"] == "authentication_error"
    assert locked_server.request("GET", "/health").status == 200
    assert locked_server.request("GET", "/v1/models", **{"x-api-key": keys["bob"]}).status == 200


def test_no_key_is_in_the_log(locked_server: SteppedServer, keys: dict[str, str]) -> None:
    assert locked_server.request("GET", "/v1/models", Authorization=f"Bearer {keys['alice']}").status == 200
    assert locked_server.request("GET", "/v1/models", Authorization="Bearer mk2-nobody").status == 401
    log = "\n".join(locked_server.lines)
    assert keys["alice"] not in log
    assert "mk2-" not in log


def test_a_server_for_other_machines_needs_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", "0.0.0.0", "--port", "0", "--key-file", str(tmp_path / "keys.json")]) == 2
    assert "mlx-k2 keys add" in capsys.readouterr().err
