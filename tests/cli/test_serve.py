"""Tests of the command `mlx-k2 serve`: its options, its end by signals, restarts of its stages, and HTTPS."""

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

import pytest

from mlx_k2.cli.main import run
from tests.cli.command import CommandLine, descendants_of
from tests.local_cluster import still_running_after
from tests.server.http_client import WAIT_S, exchange, parse_answer
from tests.server.server_process import Server, running_server

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}


def chat_request(**fields: object) -> bytes:
    """Return the bytes of an HTTP request of a chat, a streamed one by default."""
    body = json.dumps(CHAT | fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def start_answer(server: Server, **fields: object) -> socket.socket:
    """Send a streamed request. Return its connection after the first three events, which include a token."""
    connection = server.connect()
    connection.sendall(chat_request(**fields))
    received = b""
    while received.count(b"data: ") < 3:
        byte = connection.recv(1)  # the later events, which may have arrived, too, are for the caller
        assert byte
        received += byte
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """Return all that the server sends until it closes the connection."""
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def read_until_done(connection: socket.socket) -> bytes:
    """Return all that a stream sends up to its last event, and close the connection."""
    received = b""
    while b"[DONE]" not in received:
        data = connection.recv(65536)
        assert data, received[-500:]
        received += data
    connection.close()
    return received


def read_text_until_done(connection: socket.socket) -> str:
    """Return the text in the events that a stream sends up to its last event."""
    events = [json.loads(line[6:]) for line in read_until_done(connection).split(b"\n") if line.startswith(b"data: {")]
    return "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])


def test_a_port_in_use_is_an_error_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run(["serve", "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"error: port {port} of 127.0.0.1 is in use: give another --port, or end the program that has it\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "reached from other machines"),
        (("--host", "no.such.host.invalid"), "--host no.such.host.invalid is not an address"),
        (("--port", "70000"), "70000 is not in the range"),
        (("--sse-keepalive", "often"), "is not one of"),
        (("--model", "/no/such/folder"), "/no/such/folder"),
        (("--print-settings", "emacs"), "is not one of"),
        (("--print-settings", "codex"), "clients must know the port"),
    ],
)
def test_a_bad_option_is_an_error_without_a_traceback(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # has no API keys; with keys, other machines may be served
    assert run(["serve", "--port", "0", *options]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_the_printed_settings_of_a_client_follow_the_servers_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--port", "9000", "--context", "4096", "--print-settings", "codex"]) == 0
    output = capsys.readouterr()
    settings = tomllib.loads(output.out)
    provider = settings["model_providers"][settings["model_provider"]]
    assert provider["base_url"] == "http://127.0.0.1:9000/v1"
    assert (settings["model"], settings["model_context_window"]) == ("kimi-k2-tiny", 4096)
    assert "config.toml" in output.err


def test_the_property_list_runs_the_same_command_in_the_same_folder(command_line: CommandLine, tmp_path: Path) -> None:
    options = ("serve", "--port", "9000", "--drain", "45")
    result = command_line.run(*options, "--launchd", cwd=tmp_path)
    assert result.returncode == 0
    entries = plistlib.loads(result.stdout.encode())
    program, *arguments = entries["ProgramArguments"]
    assert tuple(arguments) == options
    assert Path(entries["WorkingDirectory"]) == tmp_path
    assert entries["ExitTimeOut"] > 45
    subprocess.run([program, "serve", "--help"], capture_output=True, timeout=60, check=True)


def test_the_property_list_of_a_command_started_as_a_module_starts_the_module(command_line: CommandLine) -> None:
    command = [sys.executable, "-P", "-m", "mlx_k2", "serve", "--port", "9000"]  # the property list always has -P
    result = subprocess.run([*command, "--launchd"], capture_output=True, timeout=60, env=command_line.environment())
    assert plistlib.loads(result.stdout)["ProgramArguments"] == command


def test_sigterm_lets_a_running_answer_end_and_exits_with_0(command_line: CommandLine, endless_model: Path) -> None:
    # The answer ends when it has filled the context.
    with running_server(command_line, "--model", str(endless_model), "--context", "200") as server:
        processes = descendants_of(server.process)
        connection = start_answer(server)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_line("ending: running requests may continue")
        assert b"[DONE]" in read_to_end(connection)
        assert server.process.wait(WAIT_S) == 0
        assert still_running_after(processes, 5) == []


@pytest.mark.slow
def test_a_second_signal_ends_at_once(command_line: CommandLine, endless_model: Path) -> None:
    with running_server(command_line, "--model", str(endless_model), "--drain", "600") as server:
        processes = descendants_of(server.process)
        with start_answer(server):
            server.process.send_signal(signal.SIGTERM)
            server.wait_for_line("ending: running requests may continue")
            assert server.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert still_running_after(processes, 5) == []


@pytest.mark.slow
def test_an_answer_longer_than_the_drain_ends_with_an_error(command_line: CommandLine, endless_model: Path) -> None:
    with running_server(command_line, "--model", str(endless_model), "--drain", "1") as server:
        connection = start_answer(server, temperature=0)
        assert server.end(signal.SIGTERM) == 0
        assert b'"code":"unavailable"' in read_to_end(connection)


@pytest.mark.slow
def test_an_answer_without_streaming_longer_than_the_drain_is_a_503_in_the_apis_format(
    command_line: CommandLine, endless_model: Path
) -> None:
    with (
        running_server(command_line, "--model", str(endless_model), "--drain", "1") as server,
        server.connect() as connection,
    ):
        connection.sendall(chat_request(stream=False, temperature=0))
        while not server.request("GET", "/v1/status").json["requests"]:
            pass
        assert server.end(signal.SIGTERM) == 0
        answer = parse_answer(read_to_end(connection))
        assert (answer.status, answer.error["code"]) == (503, "unavailable")
        assert int(answer.headers["retry-after"]) > 0


@pytest.mark.slow
def test_a_server_whose_standard_error_is_closed_restarts_its_stages_and_continues_the_stream(
    command_line: CommandLine, endless_model: Path
) -> None:
    process = command_line.start("serve", "--port", "0", "--model", str(endless_model), "--context", "400", "--verbose")
    assert process.stderr is not None
    lines: list[str] = []
    while not any("serving " in line for line in lines):
        lines.append(process.stderr.readline().decode())
        assert lines[-1], lines
    server = Server(process, lines, threading.Condition())  # running_server would read its standard error on
    try:
        process.stderr.close()
        for number in (1, 2):
            connection = start_answer(server)
            server.stages()[0].kill()
            assert b"[DONE]" in read_until_done(connection)
            assert server.request("GET", "/v1/status").json["restarts"] == number
    finally:
        assert server.end() == 0


@pytest.mark.slow
def test_after_a_killed_stage_the_stream_continues_and_health_and_status_report_the_restart(
    command_line: CommandLine, endless_model: Path
) -> None:
    options = ("--model", str(endless_model), "--stages", "2", "--context", "400")
    with running_server(command_line, *options) as server:
        undisturbed = read_text_until_done(start_answer(server, seed=5, max_tokens=150))
        connection = start_answer(server, seed=5, max_tokens=150)
        server.stages()[1].kill()
        server.wait_for_line("all stages start again")
        assert server.request("GET", "/health").status == 503
        assert [stage["loaded_bytes"] for stage in server.request("GET", "/v1/status").json["stages"]] == [0, 0]
        assert read_text_until_done(connection)[-200:] == undisturbed[-200:]  # start_answer has read some text
        assert server.request("GET", "/health").status == 200
        status = server.request("GET", "/v1/status").json
        assert (status["state"], status["faults"], status["restarts"]) == ("ready", 1, 1)
        faults = [stage["faults"] for stage in status["stages"]]
        assert sorted(faults) == [0, 1]  # server.stages() is in no order: the rank of the killed stage is not known
        assert all(stage["loaded_bytes"] == stage["shard_bytes"] for stage in status["stages"])
        metric = f'mlx_k2_stage_faults_total{{stage="{faults.index(1)}"}} 1.0'
        assert metric.encode() in server.request("GET", "/metrics").body


@pytest.mark.slow
def test_a_reader_of_status_events_does_not_delay_the_end(command_line: CommandLine, endless_model: Path) -> None:
    with (
        running_server(command_line, "--model", str(endless_model), "--drain", "600") as server,
        server.connect() as connection,
    ):
        connection.sendall(b"GET /v1/status/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"event: status" in connection.recv(65536) + connection.recv(65536)  # the head may come alone
        assert server.end(signal.SIGTERM) == 0


@pytest.mark.slow
def test_a_server_with_a_certificate_answers_https_and_not_http(command_line: CommandLine, tmp_path: Path) -> None:
    files = {name: str(tmp_path / f"{name}.pem") for name in ("cert", "key")}
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    command = [*openssl, "-keyout", files["key"], "-out", files["cert"]]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    with running_server(command_line, "--certfile", files["cert"], "--keyfile", files["key"]) as server:
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
