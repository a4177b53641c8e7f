"""The advice in the package's messages: each text of its source that tells the user to do something."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mlx_k2

PACKAGE = Path(mlx_k2.__file__).parent
_VERBS = (
    "add|check|close|connect|copy|correct|declare|end|fetch|give|install|keep|leave|let|make|name|put|raise|redirect|"
    "remove|rename|run|see|set|shorten|start|take|try|turn|unset|update|use|write"
)
_ADVICE = re.compile(
    r"`[^`]+ [^`]+`|\bmlx-k2 (?:download|doctor|keys|kernels)|\bhf auth|\bpip install|\bchmod"  # a command
    rf"|(?:^|[:;,(] |\b(?:or|and|then|so|there)[ ,]+)(?:{_VERBS})\b"  # an imperative
)
_NO_MESSAGES = ("testing", "server/metrics.py", "server/openapi.py")


def advice() -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield each text with advice: its place and source, and the pattern that a printed message of it has."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        if not name.startswith(_NO_MESSAGES):
            for text in _texts(ast.parse(path.read_text())):
                shown = "".join(part if isinstance(part, str) else "{}" for part in text)
                if " " in shown.strip() and _ADVICE.search(shown):
                    pattern = ".*?".join(re.escape(part) if isinstance(part, str) else "" for part in text)
                    yield f"{name}: {shown}", re.compile(pattern, re.DOTALL)


def _texts(tree: ast.AST) -> Iterator[list[str | ast.expr]]:
    """Yield the strings of a module in the order of the source, each as its texts and the values between them."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Expr(value=ast.Constant()) | ast.keyword(arg="help"):  # a docstring, an option's help
                continue
            case ast.Constant(value=str(text)):
                yield [text]
            case ast.JoinedStr(values=values):
                yield [value.value if isinstance(value, ast.Constant) else value for value in values]
                for value in values:
                    if isinstance(value, ast.FormattedValue):
                        yield from _texts(value)
            case _:
                yield from _texts(node)


ELSEWHERE: dict[str, tuple[str, ...]] = {}
NOTHING_TO_RUN: tuple[str, ...] = ()
