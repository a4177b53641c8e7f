"""The fields of Kimi K2 Thinking's config.json, read from a copy that ships with the program. Writes no file."""

from pathlib import Path
from typing import Any

from mlx_k2.json_text.read import read_json

_KIMI_K2_THINKING = Path(__file__).with_name("kimi_k2_thinking.json")


def thinking_config_fields(**changes: Any) -> dict[str, Any]:
    """Return Kimi K2 Thinking's config with ``changes``. A change of None is written as null; it removes no field."""
    fields = read_json(_KIMI_K2_THINKING.read_bytes(), dict[str, Any])
    unknown = changes.keys() - fields.keys()
    assert not unknown, f"not fields of a Kimi K2 config: {sorted(unknown)}"
    return fields | changes
