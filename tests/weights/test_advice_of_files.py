"""Tests that follow the advice in messages about checkpoint files and the Hub."""

import contextlib
import hashlib
import http.server
import io
import shlex
import shutil
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import close_session

from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.cli.main import run
from mlx_k2.errors import DownloadError, MlxK2Error
from mlx_k2.weights.checkpoint import describe_model, locate_tensors, read_small_files
from mlx_k2.weights.hub import HubRepo, fetch_small_files
from mlx_k2.weights.inventory import model_specs
from mlx_k2.weights.manifest import MANIFEST_NAME, HubFile, identify, write_manifest
from mlx_k2.weights.model_frontend import ModelFrontend
from tests.advice import follows_advice
from tests.test_advice_of_commands import NO_SERVER, REPO
from tests.weights.test_index import LFS_POINTER

pytestmark = pytest.mark.timeout(60)


@follows_advice(
    "a: if a proxy here replaces certificates, set SSL_CERT_FILE to the file of its certificates",
)
def test_a_server_with_a_certificate_of_its_own_is_reached_if_ssl_cert_file_names_the_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    repo = HubRepo(REPO, None, tmp_path / "cache", f"https://localhost:{server.server_port}")

    def fetch_error() -> str:
        close_session()  # a new session reads SSL_CERT_FILE
        with pytest.raises(DownloadError) as refused:
            fetch_small_files(repo)
        return str(refused.value)

    error_before = fetch_error()
    monkeypatch.setenv("SSL_CERT_FILE", cert)
    error_after = fetch_error()  # the server is reached, and is not a Hub
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()
    assert "set SSL_CERT_FILE to the file of its certificates" in error_before
    assert "CERTIFICATE" not in error_after


@follows_advice(
    "a: connect this host, or copy the checkpoint here and give --model its folder",
    "it is a folder of the Hub's cache: give --model owner/name, or a folder in its snapshots",
)
def test_a_copied_checkpoint_and_a_snapshot_in_the_hubs_cache_are_read(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123"
    with pytest.raises(DownloadError, match="or copy the checkpoint here and give --model its folder"):
        fetch_small_files(HubRepo("owner/name", None, tmp_path / "cache", NO_SERVER))
    shutil.copytree(BUILTIN_FOLDER, snapshot)
    with pytest.raises(MlxK2Error, match="give --model owner/name, or a folder in its snapshots"):
        read_small_files(snapshot.parents[1])
    assert "config.json" in read_small_files(snapshot)


@follows_advice(
    "a has NaN or infinity: fetch the file again",
    "a is truncated: it ends at byte 5 within b; fetch it again",
    "it is a GGUF file, which mlx-k2 does not read: fetch the original checkpoint",
    "a is missing: fetch it again",
    "its header alone has 5 bytes; fetch the file again",
    "a: install it and run `git -C a lfs pull`",
    "mlx-k2 doctor --deep --model a",
    "a is not a manifest: b; remove it; `mlx-k2 doctor --deep --model a` writes another",
    "a has 5 bytes, and b lists 6: fetch it again; if it is right, remove the manifest",
    "the model has no tiktoken.model: fetch the tokenizer files of the original checkpoint",
    "fetch the original INT4 checkpoint instead, for instance moonshotai/Kimi-K2-Thinking (594 GB)",
    "it was converted for MLX; fetch the original instead, for instance moonshotai/Kimi-K2-Thinking",
)
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model-00002-of-000008.safetensors", lambda data: data[:-1000]),
        ("model-00002-of-000008.safetensors", lambda data: data[:4]),
        ("model-00002-of-000008.safetensors", lambda data: data + b"more"),
        ("model-00002-of-000008.safetensors", lambda data: bytes(len(data))),
        ("tiktoken.model", lambda _: b""),
        ("model-00002-of-000008.safetensors", lambda _: b"GGUF\3\0\0\0"),
        ("model-00002-of-000008.safetensors", None),
        ("config.json", lambda data: data.replace(b"pack-quantized", b"fp8")),
        ("config.json", lambda _: b"<!DOCTYPE html>"),
        ("tiktoken.model", lambda _: LFS_POINTER),
        ("tiktoken.model", None),
        (MANIFEST_NAME, lambda _: b"{"),
        (MANIFEST_NAME, lambda data: data.replace(b'"size": 1', b'"size": 2')),  # some sizes begin with 1
    ],
)
def test_a_damaged_file_is_refused_and_accepted_after_the_advice_is_followed(
    tmp_path: Path, name: str, damage: Callable[[bytes], bytes] | None
) -> None:
    folder = tmp_path / "a model"
    shutil.copytree(BUILTIN_FOLDER, folder)
    shards = sorted(folder.glob("*.safetensors"))
    checksums = {shard.name: hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards}
    write_manifest(folder, {shard.name: HubFile(shard.stat().st_size, checksums[shard.name]) for shard in shards})

    def read_checkpoint() -> None:
        model = describe_model(read_small_files(folder), str(folder))
        ModelFrontend(model, 100).tokenizer.encode_text("a")
        locate_tensors(folder, model.index, model_specs(model.config))
        identify(shards)

    read_checkpoint()
    original = (folder / name).read_bytes()
    (folder / name).unlink()
    if damage is not None:
        (folder / name).write_bytes(damage(original))
    with pytest.raises(MlxK2Error, match=r"fetch|pull|remove it") as refused:
        read_checkpoint()
    if "is not a manifest" in str(refused.value):
        (folder / name).unlink()
        command = shlex.split(str(refused.value).split("`")[1])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert run(command[1:]) == 0
        assert (folder / name).exists()
    else:
        (folder / name).write_bytes(original)
    read_checkpoint()
