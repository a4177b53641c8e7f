"""Tests of the printed settings for clients: each is parsed, or run in a shell, as by its client."""

import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.server.client_settings import CLIENTS, KEY_VARIABLE, ModelAddress
from tests.advice import follows_advice

PLAIN = ModelAddress("http://127.0.0.1:8080", "moonshotai/Kimi-K2-Thinking", 131072)
TO_QUOTE = ModelAddress("http://[::1]:8080", 'a "quoted" $NAME\'s `model`\\ é\x7f', 4096)
for_each_address = pytest.mark.parametrize("address", [PLAIN, TO_QUOTE], ids=["plain", "to quote"])


def merge(present: dict[str, Any], printed: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a file to which the printed ones are added. Both have objects at their common keys."""
    common = {name: merge(present[name], printed[name]) for name in present.keys() & printed.keys()}
    return present | printed | common


def run_in_shell(
    folder: Path, client: str, address: ModelAddress, *, command: str = "", key: str | None = "mk2-key"
) -> list[str]:
    """Run the printed lines, then ``command``, in a shell. Return the started client's arguments and variables.

    They are printed by programs with the names of the clients, which this function writes to ``folder``.
    """
    for name in ("claude", "cline", "open-webui"):
        program = folder / name
        program.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\nenv -0\n")
        program.chmod(0o700)
    variables = {"PATH": f"{folder}:/usr/bin:/bin"} | ({} if key is None else {KEY_VARIABLE: key})
    script = CLIENTS[client].text_for(address) + command
    shell = subprocess.run(["/bin/sh", "-euc", script], env=variables, capture_output=True, timeout=20)
    assert shell.stderr == b""
    return shell.stdout.decode().split("\0")


@follows_advice(
    "run these lines in a shell before claude",
)
@for_each_address
def test_claude_code_gets_address_key_model_and_context(tmp_path: Path, address: ModelAddress) -> None:
    words = run_in_shell(tmp_path, "claude-code", address, command="claude")
    expected = {
        "ANTHROPIC_BASE_URL": address.url,
        "ANTHROPIC_AUTH_TOKEN": "mk2-key",
        "ANTHROPIC_MODEL": address.name,
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": address.name,
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(address.context_tokens),
    }
    assert {f"{name}={value}" for name, value in expected.items()} <= set(words)


@follows_advice(
    "put this at the start of ~/.codex/config.toml",
)
@for_each_address
@pytest.mark.parametrize("present", ["", 'approval_policy = "never"\n[model_providers.own]\nname = "own"\n[tui]\n'])
def test_codex_gets_a_provider_with_the_responses_api(address: ModelAddress, present: str) -> None:
    settings = tomllib.loads(CLIENTS["codex"].text_for(address) + present)
    user_settings = tomllib.loads(present)
    assert all(settings[name] == user_settings[name] for name in user_settings if name != "model_providers")
    assert settings["model_providers"].items() >= user_settings.get("model_providers", {}).items()
    provider = settings["model_providers"][settings["model_provider"]]
    assert (settings["model"], settings["model_context_window"]) == (address.name, address.context_tokens)
    assert (provider["base_url"], provider["wire_api"]) == (address.base_url, "responses")
    assert provider["env_key"] == KEY_VARIABLE


@follows_advice(
    "add this to ~/.config/opencode/opencode.json",
)
@for_each_address
def test_opencode_gets_a_provider_with_the_model(address: ModelAddress) -> None:
    settings = merge({"provider": {"own": {}}, "theme": "x"}, json.loads(CLIENTS["opencode"].text_for(address)))
    assert (settings["theme"], settings["provider"]["own"]) == ("x", {})
    provider_id, _, model = settings["model"].partition("/")
    provider: dict[str, Any] = settings["provider"][provider_id]
    assert model == address.name
    assert provider["options"]["baseURL"] == address.base_url
    assert provider["options"]["apiKey"] == f"{{env:{KEY_VARIABLE}}}"
    limit = provider["models"][address.name]["limit"]
    assert limit["context"] == address.context_tokens
    assert 0 < limit["output"] < address.context_tokens


@follows_advice(
    "add this to Zed's settings.json (its key: in Zed, or in the variable MLX_K_2_API_KEY )",
)
@for_each_address
def test_zed_gets_a_provider_whose_name_gives_the_variable_of_the_key(address: ModelAddress) -> None:
    settings = merge({"language_models": {"ollama": {}}}, json.loads(CLIENTS["zed"].text_for(address)))
    assert settings["language_models"]["ollama"] == {}
    ((name, provider),) = settings["language_models"]["openai_compatible"].items()
    (model,) = provider["available_models"]
    variable = "_".join(re.findall(r"[A-Z]+|[0-9]+", f"{name}_API_KEY".upper()))  # as Zed derives it
    assert variable in CLIENTS["zed"].instruction.split()
    assert provider["api_url"] == address.base_url
    assert (model["name"], model["max_tokens"]) == (address.name, address.context_tokens)
    assert model["capabilities"]["tools"]
    assert not model["capabilities"]["images"]


@follows_advice(
    "run this line in a shell",
)
@for_each_address
def test_cline_gets_address_key_and_model(tmp_path: Path, address: ModelAddress) -> None:
    subcommand, *words = run_in_shell(tmp_path, "cline", address)
    options = dict(zip(words[:8:2], words[1:8:2], strict=True))  # the variables follow
    assert subcommand == "auth"
    assert options == {
        "--provider": "openai-compatible",
        "--apikey": "mk2-key",
        "--baseurl": address.base_url,
        "--modelid": address.name,
    }


@follows_advice(
    "run these lines in a shell",
)
@for_each_address
def test_open_webui_gets_address_and_key_and_a_port_other_than_the_servers(
    tmp_path: Path, address: ModelAddress
) -> None:
    words = run_in_shell(tmp_path, "open-webui", address)
    assert {f"OPENAI_API_BASE_URL={address.base_url}", "OPENAI_API_KEY=mk2-key"} <= set(words)
    assert words[:3] == ["serve", "--port", "3000"]


def test_without_a_key_claude_code_sends_the_word_none(tmp_path: Path) -> None:
    assert "ANTHROPIC_AUTH_TOKEN=none" in run_in_shell(tmp_path, "claude-code", PLAIN, command="claude", key=None)
