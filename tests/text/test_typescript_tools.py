"""Tests of tool declarations as TypeScript: declarations written by hand, and the rules of docs/design/0050."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.text.history_reader import copied_json
from mlx_k2.text.typescript_tools import typescript_tools

HEAD, TAIL = "# Tools\n\n## functions\nnamespace functions {\n", "}\n"
PARAMETERS_HEAD, PARAMETERS_TAIL = f"{HEAD}type f = (_: {{\n", f"\n}}) => any;\n{TAIL}"


def tool(parameters: Any, **fields: Any) -> dict[str, Any]:
    """Return the function f with these parameters and further fields."""
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **fields}}


def declaration(*tools: Any) -> str:
    """Return the declaration of tools as in a prompt; '' if it has no TypeScript form."""
    return typescript_tools(copied_json(list(tools), "tools", sort=True))


def parameter_lines(schema: Any, *, required: bool = True) -> str:
    """Return the lines for a parameter ``x`` of this schema; '' if it has no TypeScript form."""
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"] if required else []}
    text = declaration(tool(parameters))
    assert not text or text.startswith(PARAMETERS_HEAD)
    return text.removeprefix(PARAMETERS_HEAD).removesuffix(PARAMETERS_TAIL)


# Each schema of a required parameter x, with its lines.
PARAMETERS: dict[str, tuple[Any, str]] = {
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
    "constraints of another type are lost": ({"type": "boolean", "minimum": 1}, "  x: boolean"),
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
    "constraints of an enum are lost": ({"type": "string", "enum": ["a"], "minLength": 1}, '  x: "a"'),
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
    "definitions in the order of their names": (
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
    "a reference to the parameters (#)": (
        tool({"properties": {"b": {"$ref": "#"}, "a": {}}, "required": ["b"], "additionalProperties": False}),
        "interface parameters {\n  a?: any,\n  b: parameters\n}\ntype f = (_: parameters) => any;\n",
    ),
}

# Schemas without a TypeScript form.
INEXPRESSIBLE_SCHEMAS: dict[str, Any] = {
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


@pytest.mark.parametrize(("schema", "lines"), PARAMETERS.values(), ids=PARAMETERS.keys())
def test_the_declaration_of_a_parameter_is_the_one_written_by_hand(schema: Any, lines: str) -> None:
    assert parameter_lines(schema) == lines
    assert parameter_lines(schema, required=False) == lines.replace("  x:", "  x?:")


@pytest.mark.parametrize(("function", "lines"), FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_the_declaration_of_a_function_is_the_one_written_by_hand(function: dict[str, Any], lines: str) -> None:
    assert declaration(function) == HEAD + lines + TAIL


@pytest.mark.parametrize("schema", INEXPRESSIBLE_SCHEMAS.values(), ids=INEXPRESSIBLE_SCHEMAS.keys())
def test_a_schema_without_a_typescript_form_removes_the_whole_declaration(schema: Any) -> None:
    assert parameter_lines(schema) == ""
    assert parameter_lines({"type": "array", "items": {"type": "object", "properties": {"y": schema}}}) == ""
    assert declaration(tool({}), tool({"properties": {"x": schema}})) == ""


def test_a_definition_must_be_read_before_it_is_referred_to_and_must_not_be_a_boolean() -> None:
    reference = {"$ref": "#/$defs/D"}
    defining = {"type": "object", "$defs": {"D": {"type": "string"}}, "properties": {"y": reference}}
    assert "y?: D" in declaration(tool({"properties": {"a": defining, "b": reference}}))
    assert declaration(tool({"properties": {"a": reference, "b": defining}})) == ""
    assert declaration(tool({"$defs": {"D": True}})) == ""


def test_only_a_reference_into_the_same_schema_finds_a_definition() -> None:
    definitions, reference = {"D": {"type": "string"}}, {"$ref": "#/$defs/D"}
    assert "[k: string]: D" in declaration(tool({"$defs": definitions, "additionalProperties": reference}))
    assert declaration(tool({"$defs": definitions, "properties": {"x": {"$ref": "other.json#/$defs/D"}}})) == ""


def test_a_reference_to_the_parameters_that_only_a_definition_has_declares_no_interface_parameters() -> None:
    text = declaration(tool({"$defs": {"D": {"$ref": "#"}}, "properties": {"x": {"type": "string"}}}))
    # as in Kimi's encoder, D refers to an interface that is not declared
    assert text == f"{HEAD}interface D parameters\ntype f = (_: {{\n  x?: string\n}}) => any;\n{TAIL}"


def test_tools_that_are_no_functions_are_left_out() -> None:
    plugin = {"type": "_plugin", "function": {"name": "p"}}
    assert declaration(plugin, tool({}), {"type": "function", "function": {}}) == declaration(tool({}))
    assert declaration(plugin) == ""
    assert declaration() == ""
    assert declaration({"type": "function"}) == ""


texts = st.sampled_from(["", "a", "two\nlines", "end\n", "<|im_end|>", "汉", "  x"])
names = st.sampled_from(["a", "B", "b", "x y", "$ref", "type", "城"])
scalars = st.sampled_from(["string", "number", "integer", "boolean", "null", "uuid"])
comment_fields = {"description": texts, "default": st.none() | st.integers() | st.booleans() | texts}
simple_schemas: st.SearchStrategy[Any] = st.one_of(
    st.booleans(),
    st.just({}),
    st.fixed_dictionaries({"type": scalars}, optional=comment_fields | {"minimum": st.integers(), "pattern": names}),
    st.fixed_dictionaries({"enum": st.lists(names | st.none() | st.floats(allow_nan=False), min_size=1, max_size=3)}),
    st.fixed_dictionaries({"type": st.lists(scalars.filter(lambda name: name != "uuid"), min_size=1, max_size=3)}),
)


def object_schemas(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy of schemas of objects whose values have these schemas."""
    return st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(names, values, max_size=3)},
        optional=comment_fields | {"required": st.lists(names, max_size=3), "additionalProperties": st.none() | values},
    )


schemas = st.recursive(
    simple_schemas,
    lambda parts: st.one_of(
        object_schemas(parts),
        st.fixed_dictionaries({"type": st.just("array")}, optional=comment_fields | {"items": parts}),
        st.fixed_dictionaries({"anyOf": st.lists(parts, min_size=1, max_size=2)}, optional=comment_fields),
    ),
    max_leaves=8,
)


@given(st.lists(object_schemas(schemas), min_size=1, max_size=3))
def test_functions_are_declared_one_after_the_other_whatever_their_parameters(all_parameters: list[Any]) -> None:
    tools = [tool(parameters, name=f"f{number}") for number, parameters in enumerate(all_parameters)]
    declarations = [declaration(function) for function in tools]
    assert all(text.startswith(HEAD) and text.endswith(TAIL) for text in declarations)
    assert declaration(*tools) == HEAD + "".join(text[len(HEAD) : -len(TAIL)] for text in declarations) + TAIL


def shuffle_keys(value: Any, data: st.DataObject) -> Any:
    """Return the same value with the keys of each object in another order."""
    match value:
        case dict():
            keys = data.draw(st.permutations(list(value)))
            return {key: shuffle_keys(value[key], data) for key in keys}
        case list():
            return [shuffle_keys(item, data) for item in value]
    return value


@given(object_schemas(schemas), st.data())
def test_the_order_of_keys_changes_nothing(parameters: dict[str, Any], data: st.DataObject) -> None:
    assert declaration(shuffle_keys(tool(parameters), data)) == declaration(tool(parameters))


@given(object_schemas(simple_schemas))
def test_required_fields_come_first_and_each_group_is_in_code_point_order(parameters: dict[str, Any]) -> None:
    untyped = {**parameters, "properties": dict.fromkeys(parameters["properties"], True)}
    lines = [line.removesuffix(",") for line in declaration(tool(untyped)).splitlines()]
    property_lines = [line for line in lines if line.endswith(": any") and "[k:" not in line]
    property_names = sorted(parameters["properties"])
    required = [name for name in property_names if name in parameters.get("required", ())]
    optional = [name for name in property_names if name not in required]
    assert property_lines == [f"  {name}: any" for name in required] + [f"  {name}?: any" for name in optional]


@given(object_schemas(schemas))
def test_each_closing_line_of_code_has_the_indent_of_the_line_that_opened_it(parameters: dict[str, Any]) -> None:
    open_indents: list[int] = []
    for line in declaration(tool(parameters)).removeprefix(HEAD).removesuffix(TAIL).splitlines():
        if not line.strip() or line.lstrip().startswith("//"):
            continue
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith(("}", ">")):
            assert indent == open_indents.pop()
        if line.endswith(("{", "<")):
            open_indents.append(indent)
    assert open_indents == []


@given(object_schemas(schemas))
def test_a_declaration_has_each_property_with_its_description_and_its_default_if_that_is_text(
    parameters: dict[str, Any],
) -> None:
    lines = declaration(tool(parameters)).splitlines()
    for name, schema in parameters["properties"].items():
        if isinstance(schema, dict):
            for line in schema.get("description", "").split("\n"):
                assert line == "" or f"  // {line}" in lines
            default = schema.get("default")
            if isinstance(default, str):
                assert f"  // Default: {json.dumps(default, ensure_ascii=False)}" in lines
        assert any(line.startswith((f"  {name}: ", f"  {name}?: ")) for line in lines)


@given(object_schemas(schemas), st.sampled_from(list(INEXPRESSIBLE_SCHEMAS.values())))
def test_one_property_without_a_typescript_form_removes_all_tools(parameters: dict[str, Any], schema: Any) -> None:
    inexpressible = copy.deepcopy(parameters)
    inexpressible["properties"]["x"] = schema
    assert declaration(tool(parameters), tool(inexpressible)) == ""
