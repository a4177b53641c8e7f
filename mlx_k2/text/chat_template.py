"""Sandboxed rendering of a checkpoint's chat template to text, with limits on time and size. Knows no token ids."""

import functools
import json
import re
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer, NodeVisitor

from mlx_k2.errors import RequestError, TokenizerError

FILE = "chat_template.jinja"

_MAX_CPU_S = 5.0
_MAX_CHARACTERS = 64_000_000
_ON_ITERATION = "mlx_k2_on_iteration"
_BOM = "\ufeff"
_NOT_ASCII = re.compile("[^\0-\x7e\U00040000-\U0010ffff]+")
"""Text that JSON escapes as ASCII, except the characters of ``mlx_k2.text.escaping``, which must stay single ones."""
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_INPUTS = ("messages", "tools", "tools_ts_str", "documents", "thinking", "preserve_thinking")
_KNOWN = frozenset((*_INPUTS, *_TOKENS, "add_generation_prompt", "strftime_now"))
"""The variables that a rendering sets, or sets on request."""


class ChatTemplate:
    """A compiled chat template. A rendering that exceeds ``max_cpu_s`` or ``max_characters`` is stopped.

    ``tokens`` are variables that some templates read: bos_token, eos_token, pad_token and unk_token.
    """

    variables: frozenset[str]
    """The variables that the template reads. What a model can do follows from them: ``thinking``, ``tools_ts_str``."""
    fields: frozenset[str]
    """Every name by which the template may read a field of a message."""

    def __init__(
        self,
        source: str,
        *,
        tokens: Mapping[str, str] | None = None,
        max_cpu_s: float = _MAX_CPU_S,
        max_characters: int = _MAX_CHARACTERS,
    ) -> None:
        self.source = source
        self._tokens = dict(tokens or {})
        self._max_cpu_s = max_cpu_s
        self._max_characters = max_characters
        environment = _Environment(max_characters)
        try:
            tree = environment.parse(source)
            self.variables = _variables(tree)
            self.fields = _field_names(tree)
            code = environment.compile(_watched(tree), filename=FILE)
        except jinja2.TemplateSyntaxError as error:
            raise TokenizerError(f"{FILE} line {error.lineno}: {error.message}") from None
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    @property
    def has_reasoning(self) -> bool:
        """Whether the template writes think tokens, as those of K2-Thinking and later models do."""
        return "<think>" in self.source

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for the user if the template reads variables that nothing sets."""
        unknown = ", ".join(sorted(self.variables - _KNOWN))
        return (f"the chat template reads variables that mlx-k2 does not set: {unknown}",) if unknown else ()

    def render(self, variables: Mapping[str, object]) -> str:
        """Return the text that the template renders for ``variables``.

        Raises:
            RequestError: the template itself refuses these messages.
            TokenizerError: the rendering fails or exceeds a limit; names the line of the template and the problem.
        """
        bounds = {_ON_ITERATION: _deadline(self._max_cpu_s)}
        parts: list[str] = []
        remaining = self._max_characters
        try:
            for part in self._template.generate(self._tokens | dict(variables) | bounds):
                parts.append(part)
                remaining -= len(part)
                if remaining < 0:
                    raise _Runaway(f"wrote more than {self._max_characters} characters")
        except _Refusal as refusal:
            raise RequestError(f"the chat template refuses these messages: {refusal}") from None
        except Exception as error:  # noqa: BLE001 - a template can raise any exception
            raise TokenizerError(f"{_location(error)}: {error or type(error).__name__}") from None
        return "".join(parts)


class _TokenizerConfig(msgspec.Struct, frozen=True):
    chat_template: Any = None
    bos_token: Any = None
    eos_token: Any = None
    pad_token: Any = None
    unk_token: Any = None


def load_chat_template(files: Mapping[str, bytes]) -> ChatTemplate:
    """Return the template of a checkpoint: chat_template.jinja, else "chat_template" in tokenizer_config.json.

    Raises:
        TokenizerError: the checkpoint has no template, or it cannot be read.
    """
    try:
        config = msgspec.json.decode(files.get("tokenizer_config.json", b"{}"), type=_TokenizerConfig)
        source = files[FILE].decode() if FILE in files else config.chat_template
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TokenizerError(f"the chat template cannot be read: {error}") from None
    if isinstance(source, list):  # several named templates
        by_name = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = by_name.get("default")
    if not isinstance(source, str):
        raise TokenizerError("the model has no chat template: give --raw to send the prompt as it is")
    tokens = {}
    for name in _TOKENS:
        token = getattr(config, name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            tokens[name] = text
    return ChatTemplate(source.removeprefix(_BOM), tokens=tokens)


class _Refusal(Exception):
    """The error for a template that called raise_exception."""


class _Runaway(Exception):
    """The error for a template that exceeds a limit on time or size, or computes a power."""


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
            raise _Runaway("computes a power, which chat templates may not")
        lengths = [len(side) if isinstance(side, str | list | tuple) else side for side in (left, right)]
        if lengths != [left, right] and all(isinstance(length, int) for length in lengths):
            size = sum(lengths) if operator == "+" else lengths[0] * lengths[1]
            if size > self._max_characters:
                raise _Runaway(f"makes a text of more than {self._max_characters} characters")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """The tag ``{% generation %}``, with which templates mark the model's own text for training. It changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the block's body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _FirstUses(NodeVisitor):
    """For each name of a template, whether its first use in the order of evaluation reads it."""

    def __init__(self) -> None:
        self.is_read: dict[str, bool] = {}

    def visit_Assign(self, node: nodes.Assign) -> None:  # noqa: N802 - the name jinja2 calls
        self.visit(node.node)
        self.visit(node.target)

    def visit_Name(self, node: nodes.Name) -> None:  # noqa: N802 - the name jinja2 calls
        self.is_read.setdefault(node.name, node.ctx == "load")


def _variables(tree: nodes.Template) -> frozenset[str]:
    """Return the variables from outside. Jinja also counts those that a template sets in one branch of an `if`."""
    uses = _FirstUses()
    uses.visit(tree)
    return frozenset(name for name in meta.find_undeclared_variables(tree) if uses.is_read.get(name, True))


def _field_names(tree: nodes.Template) -> frozenset[str]:
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    return frozenset(attributes | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)})


def _watched(tree: nodes.Template) -> nodes.Template:
    """Insert a call to ``_ON_ITERATION`` at the start of each loop's and each macro's body; return the template."""
    _AddForConcat().visit(tree)
    blocks: list[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
    for block in blocks:
        call = nodes.Call(nodes.Name(_ON_ITERATION, "load"), [], [], None, None)
        block.body.insert(0, nodes.ExprStmt(call).set_lineno(block.lineno))
    return tree


class _AddForConcat(NodeTransformer):
    """Replacement of ``a ~ b`` by ``a|string + b|string``: `+` is size-checked, and its result is still EscapedText."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:  # noqa: N802 - the name jinja2 calls
        self.generic_visit(node)
        texts: list[nodes.Expr] = [nodes.Filter(part, "string", [], [], None, None) for part in node.nodes]
        joined = functools.reduce(nodes.Add, texts)
        joined.set_lineno(node.lineno, override=True)
        return joined


def _deadline(cpu_s: float) -> Callable[[], None]:
    """Return a function that raises after ``cpu_s`` of this thread's CPU time. Waiting and sleeping do not count."""
    end = time.thread_time() + cpu_s

    def on_iteration() -> None:
        if time.thread_time() > end:
            raise _Runaway(f"did not end within {cpu_s} s of computing")

    return on_iteration


def _refuse(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers' filter of this name writes it, with its parameters in the same order."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(_json_escape, text) if ensure_ascii else text


def _json_escape(found: re.Match[str]) -> str:
    return json.dumps(found.group())[1:-1]


def _location(error: Exception) -> str:
    """Return the template's file name, with the template line that raised ``error`` if there is one."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == FILE]
    return f"{FILE} line {lines[-1]}" if lines else FILE
