"""Settings that make client programs use this server. The clients read the API key from MLX_K2_API_KEY."""

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass

KEY_VARIABLE = "MLX_K2_API_KEY"
CLAUDE_CODE_CONTEXT_TOKENS = 200_000
"""The context size that Claude Code assumes for a model that it does not know."""
_NAME = "mlx-k2"
_ZED_KEY_VARIABLE = "MLX_K_2_API_KEY"
"""Zed derives this name from the provider's name, with an underscore before each digit."""
_SHELL_KEY = f'"${{{KEY_VARIABLE}:-none}}"'
"""The key as a shell word. A server without keys accepts any text; clients refuse an empty one."""
_TIMEOUT_MS = 1_800_000
"""The longest wait of a client. A prompt of 100,000 tokens is computed for minutes before its first token."""
_MAX_OUTPUT_TOKENS = 32_000


@dataclass(frozen=True)
class ModelAddress:
    """The name of a model, and the server that serves it at ``url``, which has no path."""

    url: str
    name: str
    context_tokens: int

    @property
    def base_url(self) -> str:
        """The address for clients of OpenAI's API."""
        return f"{self.url}/v1"

    @property
    def output_tokens(self) -> int:
        """The tokens of the context that a client reserves for an answer."""
        return min(_MAX_OUTPUT_TOKENS, self.context_tokens // 4)


@dataclass(frozen=True)
class ClientSettings:
    """The settings of one client: an instruction for the user, and the function that returns the settings' text."""

    instruction: str
    text_for: Callable[[ModelAddress], str]


def _claude_code(address: ModelAddress) -> str:
    model = shlex.quote(address.name)
    return _exports(
        {
            "ANTHROPIC_BASE_URL": shlex.quote(address.url),
            "ANTHROPIC_AUTH_TOKEN": _SHELL_KEY,
            "ANTHROPIC_MODEL": model,
            "ANTHROPIC_DEFAULT_OPUS_MODEL": model,
            "ANTHROPIC_DEFAULT_SONNET_MODEL": model,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
            "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(address.context_tokens),
            "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(address.output_tokens),
            "API_TIMEOUT_MS": str(_TIMEOUT_MS),
        }
    )


def _codex(address: ModelAddress) -> str:
    """Return Codex' settings. They have no table header: the user's settings below would belong to that table."""
    provider = f"model_providers.{_NAME}"
    return f"""\
model = {_toml(address.name)}
model_provider = "{_NAME}"
model_context_window = {address.context_tokens}
show_raw_agent_reasoning = true
{provider}.name = "{_NAME}"
{provider}.base_url = {_toml(address.base_url)}
{provider}.env_key = "{KEY_VARIABLE}"
{provider}.wire_api = "responses"
{provider}.stream_idle_timeout_ms = {_TIMEOUT_MS}
"""


def _opencode(address: ModelAddress) -> str:
    model = {
        "name": address.name,
        "limit": {"context": address.context_tokens, "output": address.output_tokens},
        "reasoning": True,
        "interleaved": {"field": "reasoning_content"},
        "tool_call": True,
    }
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": _NAME,
        "options": {"baseURL": address.base_url, "apiKey": f"{{env:{KEY_VARIABLE}}}", "timeout": _TIMEOUT_MS},
        "models": {address.name: model},
    }
    settings = {
        "$schema": "https://opencode.ai/config.json",
        "model": f"{_NAME}/{address.name}",
        "provider": {_NAME: provider},
    }
    return json.dumps(settings, indent=2) + "\n"


def _cline(address: ModelAddress) -> str:
    return (
        f"cline auth --provider openai-compatible --apikey {_SHELL_KEY} "
        f"--baseurl {shlex.quote(address.base_url)} --modelid {shlex.quote(address.name)}\n"
    )


def _zed(address: ModelAddress) -> str:
    """Return Zed's settings. The key is not in them: Zed has its own store, or reads _ZED_KEY_VARIABLE."""
    model = {
        "name": address.name,
        "display_name": address.name,
        "max_tokens": address.context_tokens,
        "max_output_tokens": address.output_tokens,
        "capabilities": {"tools": True, "images": False, "parallel_tool_calls": True, "prompt_cache_key": False},
    }
    provider = {"api_url": address.base_url, "available_models": [model]}
    return json.dumps({"language_models": {"openai_compatible": {_NAME: provider}}}, indent=2) + "\n"


def _open_webui(address: ModelAddress) -> str:
    variables = {
        "OPENAI_API_BASE_URL": shlex.quote(address.base_url),
        "OPENAI_API_KEY": _SHELL_KEY,
        "DEFAULT_MODELS": shlex.quote(address.name),
        "ENABLE_OLLAMA_API": "false",
    }
    return _exports(variables) + "open-webui serve --port 3000\n"


CLIENTS: dict[str, ClientSettings] = {
    "claude-code": ClientSettings("run these lines in a shell before claude", _claude_code),
    "codex": ClientSettings("put this at the start of ~/.codex/config.toml", _codex),
    "opencode": ClientSettings("add this to ~/.config/opencode/opencode.json", _opencode),
    "cline": ClientSettings("run this line in a shell", _cline),
    "zed": ClientSettings(
        f"add this to Zed's settings.json (its key: in Zed, or in the variable {_ZED_KEY_VARIABLE} )", _zed
    ),
    "open-webui": ClientSettings("run these lines in a shell", _open_webui),
}


def _exports(variables: Mapping[str, str]) -> str:
    """Return shell commands that export variables; the values are quoted already."""
    return "".join(f"export {name}={value}\n" for name, value in variables.items())


def _toml(text: str) -> str:
    """Return a TOML basic string: JSON's escapes, and one for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
