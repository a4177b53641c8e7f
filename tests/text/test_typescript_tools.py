"""Tests of tool declarations as TypeScript: declarations written by hand, and the rules of docs/design/0050."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.text.history_reader import copied_json
from mlx_k2.text.typescript_tools import typescript_tools

START, END = "# Tools\n\n## functions\nnamespace functions {\n", "}\n"


def tool(parameters: Any, **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **function}}


def encode(*tools: Any) -> str:
    return typescript_tools(copied_json(list(tools), "tools", sort=True))


def field_lines(schema: Any, *, required: bool = True, **parameters: Any) -> str:
    """Return the lines for a parameter ``x`` of this schema; '' if it has no TypeScript form."""
    properties = {"type": "object", "properties": {"x": schema}, "required": ["x"] if required else [], **parameters}
    text = encode(tool(properties))
    opening = f"{START}type f = (_: {{\n"
    assert not text or text.startswith(opening)
    return text.removeprefix(opening).removesuffix(f"\n}}) => any;\n{END}")


# Each schema of a required parameter x, with its lines.
FIELDS: dict[str, tuple[Any, str]] = {
    "text": ({"type": "string"}, "  x: string"),
    "integer": ({"type": "integer"}, "  x: number"),
    "null": ({"type": "null"}, "  x: null"),
    "unknown type": ({"type": "uuid"}, "  x: uuid"),
    "true": (True, "  x: any"),
    "false": (False, "  x: null"),
    "empty schema": ({}, "  x: any"),
    "title is lost": ({"type": "string", "title": "X"}, "  x: string"),
    "description": ({"type": "string", "description": "one\n\n two"}, "  // one\n\n  //  two\n  x: string"),
    "empty description": ({"type": "string", "description": ""}, "  x: string"),
    "text constraints": (
        {"type": "string", "pattern": '^"\\d$', "minLength": 1, "maxLength": 9, "format": "date"},
        '  // maxLength: 9, minLength: 1, pattern: ^"\\d$\n  x: string',
    ),
    "number constraints": (
        {"type": "number", "minimum": 0, "maximum": 1e3},
        "  // maximum: 1000.0, minimum: 0\n  x: number",
    ),
    "no constraints of another type": ({"type": "boolean", "minimum": 1}, "  x: boolean"),
    "default text": ({"type": "string", "default": 'é "'}, '  // Default: "é \\""\n  x: string'),
    "default number": ({"type": "number", "default": 1e-7}, "  // Default: 1e-07\n  x: number"),
    "default boolean": ({"type": "boolean", "default": False}, "  // Default: False\n  x: boolean"),
    "default null": ({"type": "string", "default": None}, "  x: string"),
    "default list": ({"type": "array", "default": ["a", None]}, '  // Default: ["a", null]\n  x: Array<any>'),
    "all comments": (
        {"type": "integer", "description": "d", "minimum": 1, "default": 2},
        "  // d\n  // minimum: 1\n  // Default: 2\n  x: number",
    ),
    "enum": ({"enum": ["a", 'q"q', 2.5, True, None]}, '  x: "a" | "q"q" | 2.5 | True | None'),
    "enum of a nullable type": ({"type": ["null", "string"], "enum": ["a", None]}, '  x: "a" | None'),
    "enum without constraints": ({"type": "string", "enum": ["a"], "minLength": 1}, '  x: "a"'),
    "a boolean is an integer": ({"type": "integer", "enum": [1, True]}, "  x: 1 | True"),
    "any of": ({"anyOf": [{"type": "string", "description": "lost"}, {"type": "null"}]}, "  x: string | null"),
    "list of types": (
        {"type": ["integer", "object", "array", "null"]},
        "  x: number | {} | Array<any> | null",
    ),
    "array": ({"type": "array", "items": {"type": "integer", "default": 1}}, "  x: Array<number>"),
    "array of described items": (
        {"type": "array", "maxItems": 2, "items": {"type": "string", "description": "d", "maxLength": 1}},
        "  // maxItems: 2\n  x: Array<\n    // d\n    // maxLength: 1\n    string\n  >",
    ),
    "array of arrays": ({"type": "array", "items": {"type": "array", "items": {}}}, "  x: Array<Array<any>>"),
    "empty object": ({"type": "object"}, "  x: {}"),
    "object": (
        {"type": "object", "properties": {"b": {}, "B": {}, "a": {"type": "string"}}, "required": ["b", "none"]},
        "  x: {\n    b: any,\n    B?: any,\n    a?: string\n  }",
    ),
    "additional properties": (
        {"type": "object", "properties": {"a": {}}, "additionalProperties": {"type": "integer", "description": "lost"}},
        "  x: {\n    a?: any,\n    [k: string]: number\n  }",
    ),
    "no other properties": ({"type": "object", "additionalProperties": False}, "  x: {\n    [k: string]: never\n  }"),
    "any other properties": ({"type": "object", "additionalProperties": True}, "  x: {\n    [k: string]: any\n  }"),
}

FUNCTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no parameters": ({"type": "function", "function": {"name": "f"}}, "type f = (_: {}) => any;\n"),
    "no name": ({"type": "function", "function": {"description": "d"}}, "// d\ntype function = (_: {}) => any;\n"),
    "a definition in the order of names": (
        tool(
            {
                "$defs": {
                    "B": {"enum": ["r"], "description": "d"},
                    "A": {"type": "object", "properties": {"b": {"$ref": "#/$defs/B"}}},
                },
                "properties": {"x": {"$ref": "#/$defs/B", "description": "e"}},
            },
            description="g",
        ),
        'interface A {\n  b?: B\n}\n// d\ninterface B "r"\n// g\ntype f = (_: {\n  // e\n  x?: B\n}) => any;\n',
    ),
    "a reference to the whole": (
        tool({"properties": {"b": {"$ref": "#"}, "a": {}}, "required": ["b"], "additionalProperties": False}),
        "interface parameters {\n  a?: any,\n  b: parameters\n}\ntype f = (_: parameters) => any;\n",
    ),
}

NOT_EXPRESSIBLE: dict[str, Any] = {
    "one of": {"oneOf": [{"type": "string"}]},
    "const": {"const": 1},
    "only a description": {"description": "d"},
    "an unknown name in a list of types": {"type": ["string", "file"]},
    "an enum of three types": {"type": ["string", "integer", "null"], "enum": ["a"]},
    "an enum of two types": {"type": ["string", "integer"], "enum": ["a"]},
    "an enum of an empty list of types": {"type": [], "enum": ["a"]},
    "a value of another type": {"type": "string", "enum": ["a", 1]},
    "a reference to nothing": {"$ref": "#/$defs/Missing"},
    "a reference to a file": {"$ref": "other.json"},
    "text as additionalProperties": {"type": "object", "additionalProperties": "x"},
    "a description that is no text": {"type": "string", "description": ["d"]},
    "a schema that is no schema": 3,
    "a list of items": {"type": "array", "items": [{"type": "string"}]},
    "properties that are no object": {"type": "object", "properties": ["a"]},
}


@pytest.mark.parametrize(("schema", "lines"), FIELDS.values(), ids=FIELDS.keys())
def test_a_schema_is_written_like_the_declaration_by_hand(schema: Any, lines: str) -> None:
    assert field_lines(schema) == lines
    assert field_lines(schema, required=False) == lines.replace("  x:", "  x?:")


@pytest.mark.parametrize(("function", "lines"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_a_function_is_written_like_the_declaration_by_hand(function: dict[str, Any], lines: str) -> None:
    assert encode(function) == START + lines + END


@pytest.mark.parametrize("schema", NOT_EXPRESSIBLE.values(), ids=NOT_EXPRESSIBLE.keys())
def test_a_schema_without_a_typescript_form_anywhere_gives_no_declaration_at_all(schema: Any) -> None:
    assert field_lines(schema) == ""
    assert field_lines({"type": "array", "items": {"type": "object", "properties": {"y": schema}}}) == ""
    assert encode(tool({}), tool({"properties": {"x": schema}})) == ""


def test_a_definition_must_be_read_before_it_is_referred_to_and_must_be_an_object() -> None:
    reference = {"$ref": "#/$defs/D"}
    late = {"type": "object", "$defs": {"D": {"type": "string"}}, "properties": {"y": reference}}
    assert "y?: D" in encode(tool({"properties": {"a": late, "b": reference}}))
    assert encode(tool({"properties": {"a": reference, "b": late}})) == ""
    assert encode(tool({"$defs": {"D": True}})) == ""
    definitions = {"D": {"type": "string"}}
    assert "[k: string]: D" in encode(tool({"$defs": definitions, "additionalProperties": reference}))
    assert encode(tool({"$defs": definitions, "properties": {"x": {"$ref": "other.json#/$defs/D"}}})) == ""


def test_a_reference_to_the_whole_inside_a_definition_alone_makes_no_interface_of_the_whole() -> None:
    text = encode(tool({"$defs": {"D": {"$ref": "#"}}, "properties": {"x": {"type": "string"}}}))
    assert text == f"{START}interface D parameters\ntype f = (_: {{\n  x?: string\n}}) => any;\n{END}"


def test_tools_that_are_no_functions_are_passed_over() -> None:
    plugin = {"type": "_plugin", "function": {"name": "p"}}
    assert encode(plugin, tool({}), {"type": "function", "function": {}}) == encode(tool({}))
    assert encode(plugin) == encode() == encode({"type": "function"}) == ""


texts = st.sampled_from(["", "a", "two\nlines", "end\n", "<|im_end|>", "汉", "  x"])
names = st.sampled_from(["a", "B", "b", "x y", "$ref", "type", "城"])
scalars = st.sampled_from(["string", "number", "integer", "boolean", "null", "uuid"])
described = {"description": texts, "default": st.none() | st.integers() | st.booleans() | texts}
leaves: st.SearchStrategy[Any] = st.one_of(
    st.booleans(),
    st.just({}),
    st.fixed_dictionaries({"type": scalars}, optional=described | {"minimum": st.integers(), "pattern": names}),
    st.fixed_dictionaries({"enum": st.lists(names | st.none() | st.floats(allow_nan=False), min_size=1, max_size=3)}),
    st.fixed_dictionaries({"type": st.lists(scalars.filter(lambda name: name != "uuid"), min_size=1, max_size=3)}),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(names, inner, max_size=3)},
        optional=described | {"required": st.lists(names, max_size=3), "additionalProperties": st.none() | inner},
    )


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner),
        st.fixed_dictionaries({"type": st.just("array")}, optional=described | {"items": inner}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}, optional=described),
    ),
    max_leaves=8,
)


@given(st.lists(objects(schemas), min_size=1, max_size=3))
def test_every_schema_of_the_known_forms_is_expressed_one_function_after_the_other(parameters: list[Any]) -> None:
    tools = [tool(each, name=f"f{number}") for number, each in enumerate(parameters)]
    alone = [encode(each) for each in tools]
    assert all(text.startswith(START) and text.endswith(END) for text in alone)
    assert encode(*tools) == START + "".join(text[len(START) : -len(END)] for text in alone) + END


def shuffle(value: Any, data: Any) -> Any:
    """Return the same value with the keys of each object in another order."""
    match value:
        case dict():
            keys = data.draw(st.permutations(list(value)))
            return {key: shuffle(value[key], data) for key in keys}
        case list():
            return [shuffle(item, data) for item in value]
    return value


@given(objects(schemas), st.data())
def test_the_order_of_keys_changes_nothing(parameters: dict[str, Any], data: Any) -> None:
    assert encode(shuffle(tool(parameters), data)) == encode(tool(parameters))


@given(objects(leaves))
def test_required_fields_come_first_and_each_group_is_in_code_point_order(parameters: dict[str, Any]) -> None:
    plain = {**parameters, "properties": dict.fromkeys(parameters["properties"], True)}
    lines = encode(tool(plain)).splitlines()
    required = set(parameters.get("required", ()))
    fields = sorted(parameters["properties"], key=lambda name: (name not in required, name))
    expected = [f"  {name}{'' if name in required else '?'}: any" for name in fields]
    assert [
        line.removesuffix(",") for line in lines if line.endswith((": any", ": any,")) and "[k:" not in line
    ] == expected


@given(objects(schemas))
def test_braces_and_indents_match(parameters: dict[str, Any]) -> None:
    """Check the lines that are code: each closing line has the indent of the line that opened it."""
    indents: list[int] = []
    for line in encode(tool(parameters)).splitlines()[4:-1]:
        if not line.strip() or line.lstrip().startswith("//"):
            continue
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith(("}", ">")):
            assert indent == indents.pop()
        if line.endswith(("{", "<")):
            indents.append(indent)
    assert indents == []


@given(objects(schemas))
def test_a_declaration_holds_every_description_and_default_outside_of_alternatives(parameters: dict[str, Any]) -> None:
    lines = encode(tool(parameters)).splitlines()
    for name, schema in parameters["properties"].items():
        if isinstance(schema, dict):
            assert all(not part or f"  // {part}" in lines for part in schema.get("description", "").split("\n"))
            default = schema.get("default")
            if isinstance(default, str):
                assert f"  // Default: {json.dumps(default, ensure_ascii=False)}" in lines
        assert any(line.startswith((f"  {name}: ", f"  {name}?: ")) for line in lines)


@given(objects(schemas), st.sampled_from(list(NOT_EXPRESSIBLE.values())))
def test_one_part_that_cannot_be_expressed_removes_the_whole(parameters: dict[str, Any], wrong: Any) -> None:
    broken = copy.deepcopy(parameters)
    broken["properties"]["wrong"] = wrong
    assert encode(tool(parameters), tool(broken)) == ""
