"""A chat template in Jinja's sandbox: its names, and its rendering to text of limited length.

The sandbox does not limit time and memory: text/template_worker.py does, which runs the template.
"""

import functools
import json
import re
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer, NodeVisitor

FILE = "chat_template.jinja"

_NOT_ASCII = re.compile("[^\0-\x7e\U00040000-\U0010ffff]+")
"""Text that ``ensure_ascii`` writes as \\uXXXX, without the range of text/escaping.py's replacement characters."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class TemplateRefusal(Exception):
    """The error for a template that called raise_exception; its text is the argument of this call."""


class TemplateFailure(Exception):
    """The error for a template that cannot be compiled, fails or exceeds a limit; names its line if it is known."""


class TemplateNames(msgspec.Struct, frozen=True):
    """The variables that a template reads, and the names of all fields of a message that it may read."""

    variables: frozenset[str]
    fields: frozenset[str]


class JinjaTemplate:
    """A compiled template. A rendering that exceeds ``max_characters`` is stopped.

    Raises:
        TemplateFailure: the template cannot be compiled.
    """

    def __init__(self, source: str, max_characters: int) -> None:
        self._max_characters = max_characters
        environment = _Environment(max_characters)
        try:
            tree = environment.parse(source)
            self.names = TemplateNames(_variables(tree), _field_names(tree))
            code = environment.compile(_AddForConcat().visit(tree), filename=FILE)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailure(f"{FILE} line {error.lineno}: {error.message}") from None
        except Exception as error:  # noqa: BLE001 - RecursionError, SyntaxError of the code that Jinja writes, and so on
            raise TemplateFailure(f"{FILE}: {_problem(error)}") from None
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(self, variables: Mapping[str, object]) -> str:
        """Return the text that the template renders for ``variables``.

        Raises:
            TemplateRefusal: the template refuses the variables with raise_exception.
            TemplateFailure: the rendering fails or exceeds a limit; names the problem, and the line if it is known.
        """
        parts: list[str] = []
        remaining = self._max_characters
        try:
            for part in self._template.generate(variables):
                parts.append(part)
                remaining -= len(part)
                if remaining < 0:
                    raise TemplateFailure(f"wrote more than {self._max_characters} characters")
        except TemplateRefusal:
            raise
        except Exception as error:  # noqa: BLE001 - a template can raise any exception
            raise TemplateFailure(f"{_location(error)}: {_problem(error)}") from None
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """The Jinja environment that chat templates expect, without operations that make large values from small ones."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, max_characters: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self._max_characters = max_characters
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _refuse
        del self.globals["lipsum"]

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise TemplateFailure("computes a power, which chat templates may not")
        lengths = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
        has_sequence = lengths != [left, right]
        if has_sequence and all(isinstance(length, int) for length in lengths):
            size = sum(lengths) if operator == "+" else lengths[0] * lengths[1]
            if size > self._max_characters:
                raise TemplateFailure(f"makes a text of more than {self._max_characters} characters")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """The tag ``{% generation %}``, with which templates mark the model's own text for training. It changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - as in Jinja's base class

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's body, in a separate scope."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _FirstUses(NodeVisitor):
    """The first use of each name in a template, in the order of evaluation."""

    def __init__(self) -> None:
        self.is_read: dict[str, bool] = {}
        """By name: True if the first use reads it, False if it sets it."""

    def visit_Assign(self, node: nodes.Assign) -> None:  # noqa: N802 - the name jinja2 calls
        self.visit(node.node)  # the value is evaluated before the target is set
        self.visit(node.target)

    def visit_Name(self, node: nodes.Name) -> None:  # noqa: N802 - the name jinja2 calls
        self.is_read.setdefault(node.name, node.ctx == "load")


def _variables(tree: nodes.Template) -> frozenset[str]:
    """Return the names that a template reads before it sets them. A name that an earlier branch may set is left out."""
    uses = _FirstUses()
    uses.visit(tree)
    return frozenset(name for name in meta.find_undeclared_variables(tree) if uses.is_read.get(name, True))


def _field_names(tree: nodes.Template) -> frozenset[str]:
    """Return all attribute names and string constants of a template, except those with lone surrogates."""
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    constants = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(name for name in attributes | constants if not _SURROGATE.search(name))


class _AddForConcat(NodeTransformer):
    """Replacement of ``a ~ b`` by ``a|string + b|string``: its size is checked, and EscapedText stays EscapedText."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802 - the name jinja2 calls
        self.generic_visit(node)
        texts: list[nodes.Expr] = [nodes.Filter(part, "string", [], [], None, None) for part in node.nodes]
        joined = functools.reduce(nodes.Add, texts)
        joined.set_lineno(node.lineno, override=True)
        return joined


def _refuse(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON like the filter tojson of transformers, with the same parameters in the same order."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _problem(error: Exception) -> str:
    match error:
        case MemoryError():
            return "needs more memory than chat templates may use"
        case RecursionError():
            return "is nested too deep"
    return str(error) or type(error).__name__


def _location(error: Exception) -> str:
    """Return the template's file name, with the template line that raised ``error`` if there is one."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE]
    return f"{FILE} line {lines[-1]}" if lines else FILE
