"""The JSON schemas of tests/coordinator/goldens, and constraints for an answer or a tool call in JSON of a schema."""

import json
from pathlib import Path
from typing import Any

from mlx_k2.text.constraint import AnswerForm, AnswerFormat, Constraint, Tool, ToolChoice, ToolRules

TOOL = "record"
"""Name of the tool in ``call_constraint``."""


def _read_schemas() -> dict[str, Any]:
    path = Path(__file__).with_name("goldens") / "schemas.jsonl"
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    return {f"{case['suite']}-{case['line']}": case["schema"] for case in cases}


SCHEMAS = _read_schemas()


def as_parameters(schema: Any) -> Any:
    """Return a schema of a tool's arguments: ``schema`` if objects match it, else one with a field ``value``."""
    schema_type = schema.get("type")
    if schema_type == "object" or (isinstance(schema_type, list) and "object" in schema_type):
        return schema
    value = {key: entry for key, entry in schema.items() if key != "$defs"}
    wrapped = {"type": "object", "properties": {"value": value}, "required": ["value"], "additionalProperties": False}
    return wrapped | {key: entry for key, entry in schema.items() if key == "$defs"}


def answer_constraint(schema: Any) -> Constraint:
    """Return the constraint of an answer in JSON of a schema."""
    return Constraint(answer=AnswerFormat(AnswerForm.JSON_SCHEMA, schema=schema))


def call_constraint(parameters: Any, *, is_parallel: bool = True) -> Constraint:
    """Return the constraint of one or more calls of TOOL with these parameters; exactly one unless ``is_parallel``."""
    return Constraint(tools=ToolRules((Tool(TOOL, parameters),), ToolChoice.REQUIRED, is_parallel=is_parallel))
