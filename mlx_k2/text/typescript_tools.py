"""Tool declarations as TypeScript, on which K2.5 and later models were trained. Knows no template.

Their templates read the text from the variable ``tools_ts_str``, which Kimi's tokenizers compute in Python. The text
here equals theirs in order and in each space, comment and line break: docs/design/0050 lists the rules.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_INDENT = "  "
_ROOT_NAME = "parameters"
_CONSTRAINTS_BY_TYPE = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_UNION_MEMBERS = {  # by the names in a list of types
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
_ENUM_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
}


def typescript_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """Return the declarations of ``tools``, whose objects have sorted keys.

    Return '' if no tool is a function, or if a part of any schema has no TypeScript form. Names and descriptions are
    untrusted text; they are not escaped here.
    """
    functions = [tool.get("function") for tool in tools if tool.get("type") == "function"]
    try:
        declarations = "".join(_function(function) for function in functions if function)
    except (AttributeError, LookupError, TypeError, ValueError):  # a part without TypeScript form, or no JSON schema
        return ""
    return f"# Tools\n\n## functions\nnamespace functions {{\n{declarations}}}\n" if declarations else ""


def _function(function: Any) -> str:
    """Return the lines with the interfaces, the description and the type of one function."""
    reader = _SchemaReader()
    root = reader.read_object(function.get("parameters") or {}, _INDENT)
    interfaces = ""
    parameters = _ROOT_NAME
    if reader.refers_to_root:
        fields = ",\n".join(field.text for field in root.fields)
        interfaces = f"interface {_ROOT_NAME} {{\n{fields}\n}}\n" if fields else f"interface {_ROOT_NAME} {{}}\n"
    else:
        parameters = root.type_text("")
    for name, schema in list(reader.definitions.items()):  # a copy: type_of adds nested definitions, which are omitted
        interface = f"interface {name} {reader.type_of(schema, '')}\n"
        interfaces += _comments(schema.get("description"), "") + interface
    description = _comments(function.get("description"), "")
    return f"{interfaces}{description}type {function.get('name', 'function')} = (_: {parameters}) => any;\n"


@dataclass(frozen=True, order=True)
class _Field:
    """A property of an object. Required fields sort first, and then fields sort by name."""

    is_optional: bool
    name: str
    text: str
    """The field's lines in TypeScript, without a comma."""


@dataclass(frozen=True)
class _Object:
    """The fields of an object, in the order of its schema."""

    fields: list[_Field]
    other_type: str | None
    """The type of properties that the schema does not name; None if the schema does not state it."""

    def type_text(self, indent: str) -> str:
        """Return the object's type; ``indent`` is the indentation of the line where it begins."""
        texts = [field.text for field in sorted(self.fields)]
        if self.other_type is not None:
            texts.append(f"{indent}{_INDENT}[k: string]: {self.other_type}")
        return "{\n" + ",\n".join(texts) + f"\n{indent}}}" if texts else "{}"


class _SchemaReader:
    """A reader of the schemas of one function. A reference is valid if its definition was read before."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = {}
        self.refers_to_root = False

    def read_object(self, schema: Any, indent: str) -> _Object:
        """Return an object; ``indent`` is the indentation of its fields.

        Raises:
            AttributeError, LookupError, TypeError, ValueError: a part of the schema has no TypeScript form.
        """
        self.definitions |= schema.get("$defs") or {}
        other_type = self._other_type(schema.get("additionalProperties"), indent)
        properties = schema.get("properties", {})
        required = set(schema.get("required", ()))
        fields = [
            _Field(name not in required, name, self._field(name, part, indent, is_optional=name not in required))
            for name, part in properties.items()
        ]
        return _Object(fields, other_type)

    def type_of(self, schema: Any, indent: str) -> str:
        """Return the type of ``schema``; ``indent`` is the indentation of the line where it begins."""
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
                return " | ".join([_UNION_MEMBERS[member] for member in name])
            case "object":
                return self.read_object(schema, indent + _INDENT).type_text(indent)
            case "array":
                return self._array(schema.get("items") or {}, indent)
            case "integer":
                return "number"
        return name

    def _field(self, name: str, schema: Any, indent: str, *, is_optional: bool) -> str:
        text = _doc(schema, indent)
        default = schema.get("default") if isinstance(schema, Mapping) else None
        if default is not None:
            is_number = isinstance(default, int | float)  # also True and False, which Kimi's encoder writes like this
            text += f"{indent}// Default: {default if is_number else json.dumps(default, ensure_ascii=False)}\n"
        return f"{text}{indent}{name}{'?' if is_optional else ''}: {self.type_of(schema, indent)}"

    def _other_type(self, schema: Any, indent: str) -> str | None:
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
            return _ROOT_NAME
        name = target.rpartition("/")[2]
        if not target.startswith("#/$defs/") or not isinstance(self.definitions[name], Mapping):
            raise ValueError(f"{target} is not a definition of this tool")
        return name


def _enum(schema: Any) -> str:
    """Return the union of an enum's values, which must have the enum's type or be null."""
    values = schema["enum"]
    type_name = schema.get("type")
    if isinstance(type_name, list):
        max_names = 2 if "null" in type_name else 1
        if not 1 <= len(type_name) <= max_names:
            raise ValueError("an enum of several types")
        type_name = next((name for name in type_name if name != "null"), "null")
    allowed = _ENUM_TYPES.get(type_name, object)
    if not all(value is None or isinstance(value, allowed) for value in values):
        raise ValueError("a value that is not of the enum's type")
    return " | ".join([f'"{value}"' if isinstance(value, str) else str(value) for value in values])


def _doc(schema: Any, indent: str) -> str:
    """Return the comment lines for a schema's description and constraints."""
    if isinstance(schema, bool):
        return ""
    is_plain = not schema.keys() & {"$ref", "anyOf", "enum"} and isinstance(schema.get("type"), str)
    names = _CONSTRAINTS_BY_TYPE.get(schema["type"], ()) if is_plain else ()
    constraints = ", ".join(f"{name}: {schema[name]}" for name in names if name in schema)
    return _comments(schema.get("description"), indent) + (f"{indent}// {constraints}\n" if constraints else "")


def _comments(text: Any, indent: str) -> str:
    """Return each line of ``text`` as a comment line; an empty line stays empty."""
    return "".join(f"{indent}// {line}\n" if line else "\n" for line in text.split("\n")) if text else ""
