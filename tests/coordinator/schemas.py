"""The JSON schemas of tests/coordinator/goldens, as answers and as parameters of a tool."""

import json
from pathlib import Path
from typing import Any

from mlx_k2.text.constraint import AnswerForm, AnswerFormat, Constraint, Tool, ToolChoice, ToolRules

TOOL = "record"


def _read() -> dict[str, Any]:
    path = Path(__file__).with_name("goldens") / "schemas.jsonl"
    cases = [json.loads(line) for line in path.read_text().splitlines()]
    return {f"{case['suite']}-{case['line']}": case["schema"] for case in cases}


SCHEMAS = _read()


def as_parameters(schema: Any) -> Any:
    """Return the schema of a tool's arguments: ``schema``, or an object whose field ``value`` it describes."""
    kind = schema.get("type")
    if kind == "object" or (isinstance(kind, list) and "object" in kind):
        return schema
    value = {key: keyword for key, keyword in schema.items() if key != "$defs"}
    wrapped = {"type": "object", "properties": {"value": value}, "required": ["value"], "additionalProperties": False}
    return wrapped | ({"$defs": schema["$defs"]} if "$defs" in schema else {})


def answer_of(schema: Any) -> Constraint:
    """Return the constraint of an answer in JSON of this schema."""
    return Constraint(answer=AnswerFormat(AnswerForm.JSON_SCHEMA, schema=schema))


def call_of(parameters: Any, *, is_parallel: bool = True) -> Constraint:
    """Return the constraint of a required call of one tool with these parameters."""
    return Constraint(tools=ToolRules((Tool(TOOL, parameters),), ToolChoice.REQUIRED, is_parallel=is_parallel))
