"""The advice in the package's messages, and the tests that follow it, both read from source text."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

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
_FILES_WITHOUT_MESSAGES = (
    "testing/",
    "server/metrics.py",
    "server/openapi.py",
    "json_text/read.py",
    "builtin/",
    "cli/main.py",
)
_NOT_ADVICE = (  # ends of strings that `_ADVICE` matches: help about commands, a question, the name of an action
    "show or set the system prompt; off: the default",
    "remove your last message and what followed",
    "write the conversation to a file",
    "end the chat; also /exit, /bye, quit and Ctrl-D",
    "run it? [y]es, [n]o, [a]lways this tool: ",
    "connect to its neighbours",
)
_UNTESTABLE_ADVICE = (  # ends of strings whose advice no test can follow: cables, power, disks, other systems
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
    "check whether the host was restarted with another iogpu.wired_limit_mb",
)
Test = TypeVar("Test", bound=Callable[..., None])


class Advice(NamedTuple):
    """A string with advice, its file, and the pattern of the advice in a printed message.

    In ``text``, {} replaces each value that is inserted.
    """

    file: str
    text: str
    pattern: re.Pattern[str]


def follows_advice(*messages: str) -> Callable[[Test], Test]:
    """Mark a test that follows the advice of ``messages``, which are string literals, because the source is read.

    Each is an example of a printed message: it matches the package's string with any values in place of the inserted
    ones, such as "a" for a host.
    """
    return lambda test: test


def followed_messages(tests: Path) -> Iterator[str]:
    """Yield the messages of every ``follows_advice`` in the test files of a folder."""
    for path in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == follows_advice.__name__:
                yield from (ast.literal_eval(message) for message in node.args)


def all_advice() -> Iterator[Advice]:
    """Yield the advice in the package's strings."""
    for path in sorted(PACKAGE.rglob("*.py")):
        file = str(path.relative_to(PACKAGE))
        if file.startswith(_FILES_WITHOUT_MESSAGES):
            continue
        for constants in _strings(ast.parse(path.read_text())):
            text = "{}".join(constants)
            match = _ADVICE.search(text)
            # A string without a space is a key or an option, and no message.
            if match and " " in text.strip() and not text.endswith((*_NOT_ADVICE, *_UNTESTABLE_ADVICE)):
                parts = re.split(r"\{\w*\}", text[match.start() :])
                yield Advice(file, text, re.compile(".*?".join(map(re.escape, parts)), re.DOTALL))


def _strings(tree: ast.AST) -> Iterator[list[str]]:
    """Yield the strings of a module, each as the constant parts around its inserted values.

    Docstrings and the help of options are left out.
    """
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Expr(value=ast.Constant()) | ast.keyword(arg="help"):
                continue
            case ast.Constant(value=str(text)):
                yield [text]
            case ast.JoinedStr(values=values):
                constants = [""]
                for value in values:
                    if isinstance(value, ast.Constant):
                        constants[-1] += str(value.value)
                    else:
                        constants.append("")
                        yield from _strings(value)
                yield constants
            case _:
                yield from _strings(node)
