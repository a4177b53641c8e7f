"""Constraint of a reply: the format of its answer, and the tools that it may or must call. Knows no tokens."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlx_k2.errors import RequestError

MAX_TOOLS = 512
_CHOICES = ("auto", "none", "required")


class AnswerForm(enum.Enum):
    """The language in which the format of an answer is given."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    LARK = "lark"


@dataclass(frozen=True)
class AnswerFormat:
    """The format of the answer text, which follows the reasoning."""

    form: AnswerForm
    text: str = ""
    """The regular expression, or the Lark grammar; '' for JSON_SCHEMA."""
    schema: object = None
    """The parsed JSON schema; None for the other forms."""
    is_strict: bool = False
    """True: refuse a schema with a keyword that the compiler does not support, instead of ignoring the keyword."""


class ToolChoice(enum.Enum):
    """The rule for a reply's tool calls: by the model's choice, none, or at least one."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


@dataclass(frozen=True)
class Tool:
    """A tool that a reply may call. ``parameters`` is the JSON schema of its arguments; None: it takes no arguments."""

    name: str
    parameters: object = None
    is_strict: bool = False
    """True: refuse ``parameters`` with a keyword that the compiler does not support."""


@dataclass(frozen=True)
class ToolRules:
    """The tools that a reply may call, and the rules for its calls."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = ToolChoice.AUTO
    only: str | None = None
    """The name of the only tool that the reply may call; None allows all tools."""
    is_parallel: bool = True
    """False: the reply makes at most one call."""
    has_grammar: bool = True
    """False: calls that the model makes by its own choice are not constrained (``--tool-grammar off``)."""
    first_number: int | None = None
    """The number of the reply's first call, for its id; None: the number of calls in the prompt."""


@dataclass(frozen=True)
class Constraint:
    """The constraint of one reply. With ``tools`` None the reply calls no tool."""

    answer: AnswerFormat | None = None
    tools: ToolRules | None = None


def tool_rules(
    declarations: Sequence[Mapping[str, object]],
    choice: object = None,
    *,
    is_parallel: bool = True,
    has_grammar: bool = True,
    first_number: int | None = None,
) -> ToolRules:
    """Return the rules for tool declarations and a ``tool_choice`` in OpenAI's format.

    If ``choice`` names a tool, the reply makes exactly one call, of this tool.

    Raises:
        RequestError: a declaration has no name, there are more than MAX_TOOLS, or the choice is unknown, or names a
            tool that is not declared.
    """
    tools = tuple(_tool(declaration) for declaration in declarations)
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"{len(tools)} tools are declared: declare at most {MAX_TOOLS}")
    choice = "auto" if choice is None else choice
    if isinstance(choice, str) and choice in _CHOICES:
        if choice == "required" and not tools:
            raise RequestError("tool_choice is required, and no tool is declared: declare one, or leave it out")
        return ToolRules(
            tools,
            ToolChoice(choice),
            is_parallel=is_parallel,
            has_grammar=has_grammar,
            first_number=first_number,
        )
    name = _chosen_name(choice)
    if all(tool.name != name for tool in tools):
        names = ", ".join(tool.name for tool in tools) or "none"
        raise RequestError(f"tool_choice names {name!r}, which is not declared; declared tools: {names}")
    return ToolRules(
        tools,
        ToolChoice.REQUIRED,
        only=name,
        is_parallel=False,
        has_grammar=has_grammar,
        first_number=first_number,
    )


def _tool(declaration: Mapping[str, object]) -> Tool:
    function = declaration.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RequestError("a tool has no function with a name: declare tools in OpenAI's format")
    return Tool(function["name"], function.get("parameters"), function.get("strict") is True)


def _chosen_name(choice: object) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(f"tool_choice {choice!r} is unknown: give auto, none, required, or a function's name")
    return name
