"""Tests of the settings for clients: each is read as its client reads it."""

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.server.client_settings import CLIENTS, KEY_VARIABLE, ServedModel

SERVED = ServedModel("http://127.0.0.1:8080", "moonshotai/Kimi-K2-Thinking", 131072)
ODD = ServedModel("http://[::1]:8080", 'a "quoted" $NAME\'s `model`\\ é\x7f', 4096)
NAMES = [SERVED, ODD]


def run(folder: Path, client: str, served: ServedModel, *, command: str = "", key: str | None = "mk2-key") -> list[str]:
    """Run the printed lines in a shell, then ``command``; programs print their arguments and then their variables."""
    for name in ("claude", "cline", "open-webui"):
        program = folder / name
        program.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nenv -0\n")
        program.chmod(0o700)
    variables = {"PATH": f"{folder}:/usr/bin:/bin"} | ({} if key is None else {KEY_VARIABLE: key})
    program_text = CLIENTS[client].text(served) + command
    ran = subprocess.run(["/bin/sh", "-euc", program_text], env=variables, capture_output=True, timeout=20)
    assert ran.stderr == b""
    return ran.stdout.decode().split("\0")


@pytest.mark.parametrize("served", NAMES)
def test_claude_code_gets_address_key_model_and_context(tmp_path: Path, served: ServedModel) -> None:
    words = run(tmp_path, "claude-code", served, command="claude")
    expected = {
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_AUTH_TOKEN": "mk2-key",
        "ANTHROPIC_MODEL": served.name,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": served.name,
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(served.context_tokens),
    }
    assert {f"{name}={value}" for name, value in expected.items()} <= set(words)


@pytest.mark.parametrize("served", NAMES)
def test_codex_gets_a_provider_of_responses(served: ServedModel) -> None:
    settings = tomllib.loads(CLIENTS["codex"].text(served))
    provider = settings["model_providers"][settings["model_provider"]]
    assert (settings["model"], settings["model_context_window"]) == (served.name, served.context_tokens)
    assert (provider["base_url"], provider["wire_api"]) == (served.base_url, "responses")
    assert provider["env_key"] == KEY_VARIABLE


@pytest.mark.parametrize("served", NAMES)
def test_opencode_gets_a_provider_with_the_model(served: ServedModel) -> None:
    settings = json.loads(CLIENTS["opencode"].text(served))
    provider_id, _, model = settings["model"].partition("/")
    provider: dict[str, Any] = settings["provider"][provider_id]
    assert model == served.name
    assert provider["options"]["baseURL"] == served.base_url
    assert provider["options"]["apiKey"] == f"{{env:{KEY_VARIABLE}}}"
    limit = provider["models"][served.name]["limit"]
    assert limit["context"] == served.context_tokens
    assert 0 < limit["output"] < served.context_tokens


@pytest.mark.parametrize("served", NAMES)
def test_zed_gets_a_provider_whose_name_gives_the_variable_of_the_key(served: ServedModel) -> None:
    ((name, provider),) = json.loads(CLIENTS["zed"].text(served))["language_models"]["openai_compatible"].items()
    (model,) = provider["available_models"]
    assert "".join(letter if letter.isalnum() else "_" for letter in name.upper()) + "_API_KEY" == KEY_VARIABLE
    assert provider["api_url"] == served.base_url
    assert (model["name"], model["max_tokens"]) == (served.name, served.context_tokens)
    assert model["capabilities"]["tools"]
    assert not model["capabilities"]["images"]


@pytest.mark.parametrize("served", NAMES)
def test_cline_is_given_address_key_and_model(tmp_path: Path, served: ServedModel) -> None:
    auth, *words = run(tmp_path, "cline", served)
    options = dict(zip(words[:8:2], words[1:8:2], strict=True))
    assert (auth, options) == (
        "auth",
        {
            "--provider": "openai-compatible",
            "--apikey": "mk2-key",
            "--baseurl": served.base_url,
            "--modelid": served.name,
        },
    )


@pytest.mark.parametrize("served", NAMES)
def test_open_webui_is_started_with_address_and_key_on_a_port_of_its_own(tmp_path: Path, served: ServedModel) -> None:
    words = run(tmp_path, "open-webui", served)
    assert {f"OPENAI_API_BASE_URL={served.base_url}", "OPENAI_API_KEY=mk2-key"} <= set(words)
    assert words[:3] == ["serve", "--port", "3000"]


def test_without_a_key_clients_send_some_text(tmp_path: Path) -> None:
    assert "ANTHROPIC_AUTH_TOKEN=none" in run(tmp_path, "claude-code", SERVED, command="claude", key=None)
