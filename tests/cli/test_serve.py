"""Tests of `mlx-k2 serve` as a command: its start, its errors, and its end by signals."""

import json
import plistlib
import signal
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import psutil
import pytest

from mlx_k2.cli.main import run
from tests.cli.command import CommandLine, processes_below
from tests.local_cluster import wait_until_gone
from tests.server.server_process import WAIT_S, Server, exchange, parse_answer, serving

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}


def begin_answer(server: Server, **fields: object) -> socket.socket:
    """Send a streamed request and return its connection once a token has come."""
    body = json.dumps(CHAT | fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = server.connect()
    connection.sendall(head.encode() + body)
    received = b""
    while received.count(b"data: ") < 3:
        part = connection.recv(65536)
        assert part
        received += part
    return connection


def rest(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def test_a_port_in_use_is_an_error_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run(["serve", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"error: port {port} of 127.0.0.1 is in use: give another --port, or end the program that has it\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "reached from other machines"),
        (("--host", "no.such.host.invalid"), "reached from other machines"),
        (("--port", "70000"), "70000 is not in the range"),
        (("--sse-keepalive", "often"), "is not one of"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--print-settings", "emacs"), "is not one of"),
        (("--print-settings", "codex"), "clients must know the port"),
    ],
)
def test_a_bad_option_is_one_clear_error(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # without keys
    assert run(["serve", "--port", "0", *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_the_settings_of_a_client_are_printed_for_the_server_s_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--port", "9000", "--context", "4096", "--print-settings", "codex"]) == 0
    shown = capsys.readouterr()
    settings = tomllib.loads(shown.out)
    provider = settings["model_providers"][settings["model_provider"]]
    assert provider["base_url"] == "http://127.0.0.1:9000/v1"
    assert (settings["model"], settings["model_context_window"]) == ("kimi-k2-tiny", 4096)
    assert "config.toml" in shown.err


def test_the_property_list_runs_the_same_command_in_the_same_folder(command_line: CommandLine, tmp_path: Path) -> None:
    options = ("serve", "--port", "9000", "--drain", "45")
    printed = command_line.run(*options, "--launchd", cwd=tmp_path)
    assert printed.returncode == 0
    entries = plistlib.loads(printed.stdout.encode())
    program, *arguments = entries["ProgramArguments"]
    assert tuple(arguments) == options
    assert Path(entries["WorkingDirectory"]) == tmp_path
    assert entries["ExitTimeOut"] > 45
    again = subprocess.run([program, "serve", "--help"], capture_output=True, timeout=60)
    assert again.returncode == 0


def test_the_property_list_runs_a_module_with_its_python(command_line: CommandLine) -> None:
    command = [sys.executable, "-P", "-m", "mlx_k2", "serve", "--port", "9000"]
    printed = subprocess.run([*command, "--launchd"], capture_output=True, timeout=60, env=command_line.environment())
    assert plistlib.loads(printed.stdout)["ProgramArguments"] == command


def test_sigterm_lets_a_running_answer_end_and_then_exits_with_0(command_line: CommandLine, endless: Path) -> None:
    with serving(command_line, "--model", str(endless), "--context", "200") as server:
        started = processes_below(server.process)
        connection = begin_answer(server)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("ending: running requests may continue")
        assert b"[DONE]" in rest(connection)
        assert server.process.wait(WAIT_S) == 0
        assert not wait_until_gone(started, 5)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(command_line: CommandLine, endless: Path) -> None:
    with serving(command_line, "--model", str(endless), "--drain", "600") as server:
        started = processes_below(server.process)
        with begin_answer(server):
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("ending: running requests may continue")
            assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert not wait_until_gone(started, 5)


@pytest.mark.slow
def test_an_answer_longer_than_the_drain_ends_with_an_error_event(command_line: CommandLine, endless: Path) -> None:
    with serving(command_line, "--model", str(endless), "--drain", "1") as server:
        connection = begin_answer(server, temperature=0)
        assert server.end(signal.SIGTERM) == 0
        assert b'"code":"unavailable"' in rest(connection)


@pytest.mark.slow
def test_a_whole_answer_longer_than_the_drain_is_a_503_in_the_api_s_shape(
    command_line: CommandLine, endless: Path
) -> None:
    with serving(command_line, "--model", str(endless), "--drain", "1") as server, server.connect() as connection:
        body = json.dumps(CHAT | {"stream": False, "temperature": 0}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while not server.request("GET", "/v1/status").json["requests"]:
            pass
        assert server.end(signal.SIGTERM) == 0
        answer = parse_answer(rest(connection))
        assert (answer.status, answer.error["code"]) == (503, "unavailable")
        assert int(answer.headers["retry-after"]) > 0


@pytest.mark.slow
def test_a_server_whose_terminal_is_gone_restarts_its_stages_and_goes_on(
    command_line: CommandLine, endless: Path
) -> None:
    process = command_line.start("serve", "--port", "0", "--model", str(endless), "--context", "100", "--verbose")
    assert process.stderr is not None
    lines: list[str] = []
    while not any("serving " in line for line in lines):
        lines.append(process.stderr.readline().decode())
        assert lines[-1], lines
    server = Server(process, lines, threading.Condition())
    try:
        process.stderr.close()
        for number in (1, 2):
            connection = begin_answer(server)
            server.stages()[0].kill()
            assert b"[DONE]" in rest_until_done(connection)
            assert server.request("GET", "/v1/status").json["restarts"] == number
    finally:
        assert server.end() == 0


@pytest.mark.slow
def test_a_killed_stage_restarts_and_the_stream_goes_on(command_line: CommandLine, endless: Path) -> None:
    options = ("--model", str(endless), "--stages", "2", "--context", "400")
    with serving(command_line, *options) as server:
        undisturbed = rest_of_text(begin_answer(server, seed=5, max_tokens=150))
        connection = begin_answer(server, seed=5, max_tokens=150)
        psutil.Process(server.stages()[1].pid).kill()
        server.wait_for("all stages start again")
        assert server.request("GET", "/health").status == 503
        assert [stage["loaded_bytes"] for stage in server.request("GET", "/v1/status").json["stages"]] == [0, 0]
        assert rest_of_text(connection)[-200:] == undisturbed[-200:]
        assert server.request("GET", "/health").status == 200
        status = server.request("GET", "/v1/status").json
        assert (status["state"], status["faults"], status["restarts"]) == ("ready", 1, 1)
        faults = [stage["faults"] for stage in status["stages"]]
        assert sorted(faults) == [0, 1]
        assert all(stage["loaded_bytes"] == stage["shard_bytes"] for stage in status["stages"])
        counted = f'mlx_k2_stage_faults_total{{stage="{faults.index(1)}"}} 1.0'
        assert counted.encode() in server.request("GET", "/metrics").body


def rest_until_done(connection: socket.socket) -> bytes:
    """Return what a stream still sends, up to its end."""
    received = b""
    while b"[DONE]" not in received:
        part = connection.recv(65536)
        assert part, received[-500:]
        received += part
    connection.close()
    return received


def rest_of_text(connection: socket.socket) -> str:
    """Return the text that a stream still sends, up to its end."""
    events = [json.loads(line[6:]) for line in rest_until_done(connection).split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


@pytest.mark.slow
def test_a_listener_for_the_status_does_not_delay_the_end(command_line: CommandLine, endless: Path) -> None:
    with serving(command_line, "--model", str(endless), "--drain", "600") as server, server.connect() as connection:
        connection.sendall(b"GET /v1/status/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"event: status" in connection.recv(65536) + connection.recv(65536)
        assert server.end(signal.SIGTERM) == 0


@pytest.mark.slow
def test_a_certificate_makes_the_server_one_of_https(command_line: CommandLine, tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.pem") for name in ("cert", "key")}
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*made, "-keyout", files["key"], "-out", files["cert"]], check=True, capture_output=True, timeout=60)
    with serving(command_line, "--certfile", files["cert"], "--keyfile", files["key"]) as server:
        context = ssl.create_default_context(cafile=files["cert"])
        with context.wrap_socket(server.connect(), server_hostname="127.0.0.1") as connection:
            request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            assert exchange(connection, request).status == 200
        with server.connect() as plain:
            plain.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert not plain.recv(100).startswith(b"HTTP")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--certfile", "/no/such/file"), "--certfile and --keyfile cannot be used"),
        (("--keyfile", "/no/such/file"), "add --certfile"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_an_error(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "--port", "0", *options]) == 2
    assert message in capsys.readouterr().err
