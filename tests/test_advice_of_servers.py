"""Tests that follow the advice of messages about servers and their keys."""

import contextlib
import io
import shlex
import socket
import subprocess
from pathlib import Path

import msgspec
import pytest

from mlx_k2.cli.main import run
from mlx_k2.client.remote_engine import RemoteEngine
from mlx_k2.client.server_connection import ServerAddress
from mlx_k2.errors import RequestError, SetupError
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Request
from mlx_k2.server.access import Access
from mlx_k2.server.api_errors import ApiError
from mlx_k2.server.api_keys import KeyRing, add_key, read_keys, remove_key
from mlx_k2.server.http_server import listening_socket
from tests.advice import follows_advice
from tests.server.in_process import stepped_server
from tests.test_advice_of_commands import NO_MODEL, refusal

pytestmark = pytest.mark.timeout(60)


@follows_advice(
    "others can read the key file k: run `chmod 600 k`",
    "the name of a key is empty: give one",
    "there is a key 'a' already: remove it first, or give another name",
)
def test_the_advice_for_a_key_file_lets_keys_be_read_and_added(tmp_path: Path) -> None:
    path = tmp_path / "my keys"
    with pytest.raises(SetupError, match="the name of a key is empty: give one"):
        add_key(path, "")
    add_key(path, "a")
    with pytest.raises(SetupError, match="already: remove it first, or give another name"):
        add_key(path, "a")
    add_key(path, "b")
    remove_key(path, "a")
    add_key(path, "a")
    path.chmod(0o644)
    with pytest.raises(SetupError, match="others can read the key file") as raised:
        read_keys(path)
    subprocess.run(str(raised.value).split("`")[1], shell=True, check=True, timeout=20)
    assert [key.name for key in read_keys(path)] == ["b", "a"]
    with pytest.raises(SetupError, match=r"there is no key 'c' in .*my keys; its keys: b, a$"):
        remove_key(path, "c")


@follows_advice(
    "a: make one with `mlx-k2 keys add --key-file k NAME`",
    "port 5 of 127.0.0.1 is in use: give another --port, or end the program that has it",
)
def test_the_printed_command_makes_the_missing_key_and_another_or_a_freed_port_can_be_used(tmp_path: Path) -> None:
    keys = str(tmp_path / "my keys")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        serve = ["serve", "--host", "0.0.0.0", "--port", port, "--key-file", keys]
        error = refusal(*serve)
        assert "and there is no key: make one with `mlx-k2 keys add" in error
        program, *add_key_arguments = shlex.split(error.split("`")[1])
        assert program == "mlx-k2"
        with contextlib.redirect_stdout(io.StringIO()):
            assert run(add_key_arguments) == 0
        assert f"port {port} of 0.0.0.0 is in use: give another --port, or end the program" in refusal(*serve)
        with pytest.raises(SetupError, match="give another --port, or end the program that has it"):
            listening_socket("127.0.0.1", int(port))
        listening_socket("127.0.0.1", 0).close()
    listening_socket("127.0.0.1", int(port)).close()


@follows_advice(
    "this Host is not allowed: see --allow-host",
    "this Origin is not allowed: see --allow-origin",
)
def test_hosts_and_origins_are_allowed_by_the_options_that_their_refusals_name() -> None:
    scope = {"headers": [(b"host", b"k2.example"), (b"origin", b"https://chat.example")]}
    with pytest.raises(ApiError, match="this Host is not allowed: see --allow-host"):
        Access(hosts=(), origins=(), keys=None).check_origin(scope)
    with pytest.raises(ApiError, match="this Origin is not allowed: see --allow-origin"):
        Access(hosts=("k2.example",), origins=(), keys=None).check_origin(scope)
    Access(hosts=("k2.example",), origins=("https://chat.example",), keys=None).check_origin(scope)
    options = ["--allow-host", "k2.example", "--allow-origin", "https://chat.example"]
    assert "/no/such/folder does not exist" in refusal("serve", *options, *shlex.split(NO_MODEL))


class ModelFiles(msgspec.Struct):
    """The answer of /v1/model-files, of which this test reads only the model's name."""

    name: str


@follows_advice(
    "k has no key, so that every request would be refused: make one with `mlx-k2 keys add NAME`, or remove k",
    "no key is left, and servers refuse every request: make one with `mlx-k2 keys add NAME`; "
    "or, to need none on 127.0.0.1, remove k and start the server again",
)
def test_after_the_last_key_a_new_key_or_the_removal_of_the_file_lets_a_server_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "my keys"
    add_key(keys, "a")
    assert run(["keys", "remove", "--key-file", str(keys), "a"]) == 0
    removed = capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serve = ["serve", "--port", str(listener.getsockname()[1]), "--key-file", str(keys)]
        error = refusal(*serve)
        keys.unlink()
        assert "is in use" in refusal(*serve), "without the file the server gets as far as its port"
    assert f"{keys} has no key, so that every request would be refused: make one with `" in error
    for message in (removed, error):
        assert f"remove {keys}" in message
        program, *add_key_arguments = shlex.split(message.split("`")[1])
        assert program == "mlx-k2"
        assert run([*add_key_arguments[:-1], "new"]) == 0
        assert [key.name for key in read_keys(keys)] == ["new"]
        remove_key(keys, "new")


@follows_advice(
    "u refuses the key: set MLX_K2_API_KEY to one that `mlx-k2 keys add NAME` printed there",
)
def test_a_client_is_answered_only_with_a_key_that_was_added_to_the_key_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    key = add_key(keys, "me")
    with stepped_server(keys=KeyRing(keys, is_required=True)) as server:
        with pytest.raises(SetupError, match="needs a key: set MLX_K2_API_KEY to one that `mlx-k2 keys add NAME`"):
            ServerAddress(server.url, None).get("/v1/model-files", ModelFiles)
        with pytest.raises(SetupError, match="refuses the key: set MLX_K2_API_KEY to one that"):
            ServerAddress(server.url, "wrong").get("/v1/model-files", ModelFiles)
        assert ServerAddress(server.url, key).get("/v1/model-files", ModelFiles)


@follows_advice(
    "--connect gets no log-probabilities: leave out --logprobs",
    "give a text as prompt, or messages",
)
def test_requests_to_a_server_that_follow_the_advice_of_their_refusals_are_accepted() -> None:
    with stepped_server() as server:
        assert "give a text as prompt, or messages" in server.request("POST", "/tokenize", {}).body.decode()
        assert server.request("POST", "/tokenize", {"prompt": "a"}).status == 200
        engine = RemoteEngine(ServerAddress(server.url, None))
        with pytest.raises(RequestError, match="--connect gets no log-probabilities: leave out --logprobs"):
            engine.submit(Request((5,), 1, Sampling(seed=1, num_logprobs=1), frozenset()))
        engine.submit(Request((5,), 1, Sampling(seed=1), frozenset())).cancel()
