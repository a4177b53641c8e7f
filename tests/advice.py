"""The advice in the package's messages, and the tests that follow it, both read from source text."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

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
_NO_MESSAGES = ("testing/", "server/metrics.py", "server/openapi.py", "json_text/read.py", "builtin/", "cli/main.py")
_NO_ADVICE = (  # what commands do, in /help; a question; an action that is named
    "show or set the system prompt; off: the model's own",
    "remove your last message and what followed",
    "write the conversation to a file",
    "end the chat; also /exit, /bye, quit and Ctrl-D",
    "run it? [y]es, [n]o, [a]lways this tool: ",
    "connect to its neighbours",
)
_FOR_HANDS = (  # what no command does: cables, power, disks, other systems, machines that are to be bought
    "use a cable, not Wi-Fi",
    "update all to the same",
    "to macOS 26.2 or newer, or {}",
    "update to macOS 26.3",
    "end other programs there",
    "free some, then",
    "slow; see that the hostfile's ips are those of the cable",
    "see that it is awake and on this network",
    "check the cable and the addresses",
    "check the cable and the addresses in the hostfile",
    "not tried: see the failures above",
    "check whether it was restarted with another iogpu.wired_limit_mb",
)
Test = TypeVar("Test", bound=Callable[..., None])


def follows_advice(*messages: str) -> Callable[[Test], Test]:
    """Mark a test that follows the advice of ``messages``, written as constants."""
    return lambda test: test


def followed(tests: Path) -> Iterator[str]:
    """Yield the messages of every ``follows_advice`` in the test files of a folder."""
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == follows_advice.__name__:
                yield from (ast.literal_eval(message) for message in node.args)


def advice() -> Iterator[tuple[str, re.Pattern[str]]]:
    """Yield each text with advice: its place and source, and the pattern of the advice in a printed message."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = str(path.relative_to(PACKAGE))
        for parts in _texts(ast.parse(path.read_text())) if not name.startswith(_NO_MESSAGES) else ():
            shown = "{}".join(parts)
            found = _ADVICE.search(shown)
            if found is not None and " " in shown.strip() and not shown.endswith((*_NO_ADVICE, *_FOR_HANDS)):
                advised = re.split(r"\{\w*\}", shown[found.start() :])
                yield f"{name}: {shown}", re.compile(".*?".join(map(re.escape, advised)), re.DOTALL)


def _texts(tree: ast.AST) -> Iterator[list[str]]:
    """Yield the strings of a module in the order of its source, each as the constant parts around its values."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Expr(value=ast.Constant()) | ast.keyword(arg="help"):  # a docstring, an option's help
                continue
            case ast.Constant(value=str(text)):
                yield [text]
            case ast.JoinedStr(values=values):
                parts = [""]
                for value in values:
                    if isinstance(value, ast.Constant):
                        parts[-1] += str(value.value)
                    else:
                        parts.append("")
                        yield from _texts(value)
                yield parts
            case _:
                yield from _texts(node)
