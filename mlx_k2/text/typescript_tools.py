"""Tool declarations as TypeScript, the form in which K2.5 and later were trained on them. Knows no template.

Their templates read it from the variable ``tools_ts_str``, which the checkpoint's tokenizer computes in Python. Every
space, comment and line break counts, and so does the order: docs/design/0050 lists the rules.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_INDENT = "  "
_ROOT = "parameters"
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_UNION = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
_ENUM_VALUES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
}


def typescript_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the declarations of ``tools``, whose objects have sorted keys; '' if they have no TypeScript form.

    That is so if no tool is a function, or if any part of any schema has no such form. Names and descriptions are text
    from outside, and are not escaped.
    """
    functions = [tool.get("function") for tool in tools if tool.get("type") == "function"]
    try:
        declared = "".join(_function(function) for function in functions if function)
    except (AttributeError, LookupError, TypeError, ValueError):  # also for a value that is not a JSON schema
        return ""
    return f"# Tools\n\n## functions\nnamespace functions {{\n{declared}}}\n" if declared else ""


def _function(function: Any) -> str:
    """Return the interfaces, the description and the type of one function, as complete lines."""
    reader = _SchemaReader()
    root = reader.read_object(function.get("parameters") or {}, _INDENT)
    interfaces = ""
    parameters = _ROOT
    if reader.refers_to_root:
        fields = ",\n".join(field.text for field in root.fields)
        interfaces = f"interface {_ROOT} {{\n{fields}\n}}\n" if fields else f"interface {_ROOT} {{}}\n"
    else:
        parameters = root.type_text("")
    for name, schema in list(reader.definitions.items()):
        interface = f"interface {name} {reader.type_of(schema, '')}\n"
        interfaces += _comments(schema.get("description"), "") + interface
    description = _comments(function.get("description"), "")
    return f"{interfaces}{description}type {function.get('name', 'function')} = (_: {parameters}) => any;\n"


@dataclass(frozen=True, order=True)
class _Field:
    """A property of an object. Required ones sort first, then by name."""

    is_optional: bool
    name: str
    text: str


@dataclass(frozen=True)
class _Object:
    """The fields of an object in the order of its schema, and the type of all other properties; None if it has none."""

    fields: list[_Field]
    others: str | None

    def type_text(self, indent: str) -> str:
        """Return the object's type; ``indent`` is that of the line on which it begins."""
        texts = [field.text for field in sorted(self.fields)]
        if self.others is not None:
            texts.append(f"{indent}{_INDENT}[k: string]: {self.others}")
        return "{\n" + ",\n".join(texts) + f"\n{indent}}}" if texts else "{}"


class _SchemaReader:
    """A reader of one function's schemas. A reference is valid if its definition was read before it."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self.refers_to_root = False

    def read_object(self, schema: Any, indent: str) -> _Object:
        """Return the fields of an object; ``indent`` is that of the fields.

        Raises:
            AttributeError, LookupError, TypeError, ValueError: a part of it has no TypeScript form.
        """
        self.definitions |= schema.get("$defs") or {}
        others = self._others(schema.get("additionalProperties"), indent)
        properties = schema.get("properties", {})
        required = set(schema.get("required", ()))
        fields = [
            _Field(name not in required, name, self._field(name, part, indent, optional=name not in required))
            for name, part in properties.items()
        ]
        return _Object(fields, others)

    def type_of(self, schema: Any, indent: str) -> str:
        """Return the type of ``schema``; ``indent`` is that of the line on which it begins."""
        if isinstance(schema, bool):
            return "any" if schema else "null"
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "anyOf" in schema:
            return " | ".join([self.type_of(part, indent) for part in schema["anyOf"]])
        if "enum" in schema:
            return _enum(schema)
        if schema == {}:
            return "any"
        name: str = schema["type"]
        match name:
            case list():
                return " | ".join([_UNION[each] for each in name])
            case "object":
                return self.read_object(schema, indent + _INDENT).type_text(indent)
            case "array":
                return self._array(schema.get("items") or {}, indent)
            case "integer":
                return "number"
        return name

    def _field(self, name: str, schema: Any, indent: str, *, optional: bool) -> str:
        text = _doc(schema, indent)
        default = schema.get("default") if isinstance(schema, Mapping) else None
        if default is not None:
            is_number = isinstance(default, int | float)
            text += f"{indent}// Default: {default if is_number else json.dumps(default, ensure_ascii=False)}\n"
        return f"{text}{indent}{name}{'?' if optional else ''}: {self.type_of(schema, indent)}"

    def _others(self, schema: Any, indent: str) -> str | None:
        if isinstance(schema, bool):
            return "any" if schema else "never"
        return None if schema is None else self.type_of(schema, indent)

    def _array(self, items: Any, indent: str) -> str:
        inner = indent + _INDENT
        doc = _doc(items, inner)
        if doc:
            return "Array<\n" + doc + inner + self.type_of(items, inner) + f"\n{indent}>"
        return f"Array<{self.type_of(items, indent)}>"

    def _reference(self, target: str) -> str:
        if target == "#":
            self.refers_to_root = True
            return _ROOT
        name = target.rpartition("/")[2]
        if not target.startswith("#/$defs/") or not isinstance(self.definitions[name], Mapping):
            raise ValueError(f"{target} is not a definition of this tool")
        return name


def _enum(schema: Any) -> str:
    values = schema["enum"]
    names = schema.get("type")
    if isinstance(names, list):
        if len(names) not in (1, 1 + ("null" in names)):
            raise ValueError("an enum of several types")
        names = next((name for name in names if name != "null"), "null")
    allowed = _ENUM_VALUES.get(names, object)
    if not all(value is None or isinstance(value, allowed) for value in values):
        raise ValueError("a value that is not of the enum's type")
    return " | ".join([f'"{value}"' if isinstance(value, str) else str(value) for value in values])


def _doc(schema: Any, indent: str) -> str:
    """Return the comment lines for a schema's description and constraints."""
    if isinstance(schema, bool):
        return ""
    is_plain = not schema.keys() & {"$ref", "anyOf", "enum"} and isinstance(schema.get("type"), str)
    names = _CONSTRAINTS.get(schema["type"], ()) if is_plain else ()
    constraints = ", ".join(f"{name}: {schema[name]}" for name in names if name in schema)
    return _comments(schema.get("description"), indent) + (f"{indent}// {constraints}\n" if constraints else "")


def _comments(text: Any, indent: str) -> str:
    """Return each line of ``text`` as a comment line; an empty line stays empty."""
    return "".join(f"{indent}// {line}\n" if line else "\n" for line in text.split("\n")) if text else ""
