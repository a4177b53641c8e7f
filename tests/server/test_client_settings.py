"""Tests of the settings for clients: each is read as its client reads it."""

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.server.client_settings import CLIENTS, KEY_VARIABLE, ModelAddress
from tests.advice import follows_advice

USUAL = ModelAddress("http://127.0.0.1:8080", "moonshotai/Kimi-K2-Thinking", 131072)
ODD = ModelAddress("http://[::1]:8080", 'a "quoted" $NAME\'s `model`\\ é\x7f', 4096)
NAMES = [USUAL, ODD]


def run(
    folder: Path, client: str, address: ModelAddress, *, command: str = "", key: str | None = "mk2-key"
) -> list[str]:
    """Run the printed lines in a shell, then ``command``; programs print their arguments and then their variables."""
    for name in ("claude", "cline", "open-webui"):
        program = folder / name
        program.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nenv -0\n")
        program.chmod(0o700)
    variables = {"PATH": f"{folder}:/usr/bin:/bin"} | ({} if key is None else {KEY_VARIABLE: key})
    program_text = CLIENTS[client].text(address) + command
    ran = subprocess.run(["/bin/sh", "-euc", program_text], env=variables, capture_output=True, timeout=20)
    assert ran.stderr == b""
    return ran.stdout.decode().split("\0")


@pytest.mark.parametrize("address", NAMES)
def test_claude_code_gets_address_key_model_and_context(tmp_path: Path, address: ModelAddress) -> None:
    words = run(tmp_path, "claude-code", address, command="claude")
    expected = {
        "ANTHROPIC_BASE_URL": address.url,
        "ANTHROPIC_AUTH_TOKEN": "mk2-key",
        "ANTHROPIC_MODEL": address.name,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": address.name,
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(address.context_tokens),
    }
    assert {f"{name}={value}" for name, value in expected.items()} <= set(words)


@pytest.mark.parametrize("address", NAMES)
def test_codex_gets_a_provider_of_responses(address: ModelAddress) -> None:
    settings = tomllib.loads(CLIENTS["codex"].text(address))
    provider = settings["model_providers"][settings["model_provider"]]
    assert (settings["model"], settings["model_context_window"]) == (address.name, address.context_tokens)
    assert (provider["base_url"], provider["wire_api"]) == (address.base_url, "responses")
    assert provider["env_key"] == KEY_VARIABLE


@pytest.mark.parametrize("address", NAMES)
def test_opencode_gets_a_provider_with_the_model(address: ModelAddress) -> None:
    settings = json.loads(CLIENTS["opencode"].text(address))
    provider_id, _, model = settings["model"].partition("/")
    provider: dict[str, Any] = settings["provider"][provider_id]
    assert model == address.name
    assert provider["options"]["baseURL"] == address.base_url
    assert provider["options"]["apiKey"] == f"{{env:{KEY_VARIABLE}}}"
    limit = provider["models"][address.name]["limit"]
    assert limit["context"] == address.context_tokens
    assert 0 < limit["output"] < address.context_tokens


@pytest.mark.parametrize("address", NAMES)
def test_zed_gets_a_provider_whose_name_gives_the_variable_of_the_key(address: ModelAddress) -> None:
    ((name, provider),) = json.loads(CLIENTS["zed"].text(address))["language_models"]["openai_compatible"].items()
    (model,) = provider["available_models"]
    assert "".join(letter if letter.isalnum() else "_" for letter in name.upper()) + "_API_KEY" == KEY_VARIABLE
    assert provider["api_url"] == address.base_url
    assert (model["name"], model["max_tokens"]) == (address.name, address.context_tokens)
    assert model["capabilities"]["tools"]
    assert not model["capabilities"]["images"]


@pytest.mark.parametrize("address", NAMES)
def test_cline_is_given_address_key_and_model(tmp_path: Path, address: ModelAddress) -> None:
    auth, *words = run(tmp_path, "cline", address)
    options = dict(zip(words[:8:2], words[1:8:2], strict=True))
    assert (auth, options) == (
        "auth",
        {
            "--provider": "openai-compatible",
            "--apikey": "mk2-key",
            "--baseurl": address.base_url,
            "--modelid": address.name,
        },
    )


@pytest.mark.parametrize("address", NAMES)
def test_open_webui_is_started_with_address_and_key_on_a_port_of_its_own(tmp_path: Path, address: ModelAddress) -> None:
    words = run(tmp_path, "open-webui", address)
    assert {f"OPENAI_API_BASE_URL={address.base_url}", "OPENAI_API_KEY=mk2-key"} <= set(words)
    assert words[:3] == ["serve", "--port", "3000"]


def test_without_a_key_clients_send_some_text(tmp_path: Path) -> None:
    assert "ANTHROPIC_AUTH_TOKEN=none" in run(tmp_path, "claude-code", USUAL, command="claude", key=None)
