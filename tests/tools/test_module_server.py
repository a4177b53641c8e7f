"""Tests of the functions of a Python file as tools in a separate process, which contains their failures."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mcp.server.mcpserver import MCPServer

from mlx_k2.errors import ToolsError
from mlx_k2.tools.module_server import _MODULE_NAME, UnusableFunction, _add_tool, main
from mlx_k2.tools.outcome import Outcome, ToolResult
from mlx_k2.tools.servers import python_module
from mlx_k2.tools.toolbox import Limits, open_toolbox
from tests.advice import follows_advice

pytestmark = pytest.mark.timeout(60)

LIMITS = Limits(start_timeout_s=40.0, call_timeout_s=20.0, max_result_chars=1000)

MODULE = '''
import os, threading
from dataclasses import dataclass
from os.path import join
from typing import Annotated, Literal
from pydantic import Field
import neighbour

print("printed while it is loaded")

@dataclass
class Point:
    x: int

Days = Annotated[int, Field(description="how many", ge=1)]

def weather(city: str, unit: Literal["C", "F"] = "C", days: Days = 1) -> str:
    """The weather of a city.

    Args:
        city: its name
    """
    print("printed in a call")
    return f"{city} {unit} {days}"

async def later() -> list[dict[str, int]]:
    return [{"a": 1}, {"b": 2}]

def point() -> Point:
    return Point(neighbour.X)

def key() -> str:
    return os.environ["MY_KEY"]

def broken() -> None:
    raise KeyError("cupboard")

def leave() -> None:
    raise SystemExit(3)

def hang() -> None:
    threading.Event().wait()

def _private() -> None: ...
'''


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """Return the file of MODULE, beside the module that it imports."""
    (tmp_path / "neighbour.py").write_text("X = 7")
    (tmp_path / "mine.py").write_text(MODULE)
    return tmp_path / "mine.py"


def environment(**variables: str) -> dict[str, str]:
    """Return the environment of a tool server, in which a function's output is written at once."""
    return {**os.environ, "PYTHONUNBUFFERED": "1", **variables}


def test_signatures_and_docstrings_become_declarations(module: Path) -> None:
    with open_toolbox([python_module(module, environment())], LIMITS) as box:
        assert list(box.tools) == ["weather", "later", "point", "key", "broken", "leave", "hang"]
        weather = box.tools["weather"]
    assert weather.description == "The weather of a city.\n\nArgs:\n    city: its name"
    assert weather.parameters["required"] == ["city"]
    properties = weather.parameters["properties"]
    assert properties["unit"]["enum"] == ["C", "F"]
    assert (properties["days"]["description"], properties["days"]["minimum"]) == ("how many", 1)


def test_functions_may_return_text_or_json_and_may_print(module: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_toolbox([python_module(module, environment(MY_KEY="secret"))], LIMITS) as box:
        assert box.call("weather", {"city": "Rome", "unit": "F"}) == ToolResult(Outcome.DONE, "Rome F 1")
        assert box.call("later", {}).text == '[{"a":1},{"b":2}]'
        assert box.call("point", {}).text == '{"x":7}'
        assert box.call("key", {}).text == "secret"
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warnings, "the text that a function prints was read as a message of MCP"


def test_an_exception_in_a_function_becomes_a_failed_result(module: Path) -> None:
    with open_toolbox([python_module(module, environment())], LIMITS) as box:
        result = box.call("broken", {})
        assert result.outcome is Outcome.FAILED
        assert "KeyError: 'cupboard'" in result.text
        assert "days" in box.call("weather", {"city": "Rome", "days": 0}).text
        assert "SystemExit: 3" in box.call("leave", {}).text
        assert box.call("weather", {"city": "Rome"}).text == "Rome C 1"


@follows_advice(
    "the parameter x has no name that a model can give: name each parameter",
)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:", "SyntaxError: "),
        ("import no_such_package", "line 1: ModuleNotFoundError: No module named 'no_such_package'"),
        ("raise SystemExit('not today')", "line 1: SystemExit: not today"),
        ("x = 1", "ImportError: it defines no public function"),
        ("__all__ = ['f']", "AttributeError: "),
        ("def f(_hidden: int): ...", "line 1: f: Parameter _hidden of f cannot start with '_'"),
        ("__all__ = ['f']\nf = 3", "ImportError: __all__ names f, which is not a function"),
        ("x = 1\ndef f(x, /): ...", "line 2: f: the parameter x has no name that a model can give"),
        ("def f(*values): ...", "line 1: f: the parameter *values has no name that a model can give"),
        ("def f(**values): ...", "line 1: f: the parameter **values has no name that a model can give"),
        ("def g(): ...\ndef f(): yield 1", "line 2: f: it is a generator: return a list"),
        ("async def f(): yield 1", "line 1: f: it is a generator: return a list"),
        ("def f(x: 'Nothing'): ...", "line 1: f: Unable to evaluate type annotations"),
        ("import socket\ndef f(x: socket.socket): ...", "line 2: f: Cannot generate a JsonSchema"),
    ],
)
def test_an_unusable_tools_module_ends_its_process_with_one_line_about_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    """The process's main function runs in this process, where an exception replaces `os._exit`."""

    def raise_exit(code: int) -> NoReturn:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", raise_exit)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(SystemExit) as caught:
        main(tmp_path / "mine.py")
    sys.modules.pop(_MODULE_NAME, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert line.startswith(message)


def test_an_unusable_tools_module_is_refused_with_the_line_of_its_process(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("x = 1\nraise ValueError('no licence')")
    with pytest.raises(ToolsError) as caught, open_toolbox([python_module(path, environment())], LIMITS):
        pass
    assert "mine.py: it ended; it wrote last: line 2: ValueError: no licence" in str(caught.value)
    assert "\n" not in str(caught.value)


UNUSUAL_MODULE = """
class BaseError(BaseException): pass

def interrupt(): raise KeyboardInterrupt("no")
def base_error(): raise BaseError("no")
async def async_base_error(): raise BaseError("no")
def text(): return "caf\\udce9.txt"
def names(): return ["caf\\udce9.txt", "ok"]
def broken_text(): raise ValueError("caf\\udce9")
def iterator(): return map(str, [1, 2])
def cyclic_list():
    items = []
    items.append(items)
    return items
function_without_def = lambda: "by its name in the file"
"""


def test_any_result_and_any_exception_of_a_function_is_text_and_the_next_call_works(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(UNUSUAL_MODULE)
    with open_toolbox([python_module(tmp_path / "mine.py", environment())], LIMITS) as box:
        for name in ("interrupt", "base_error", "async_base_error", "cyclic_list"):
            assert box.call(name, {}).outcome is Outcome.FAILED
        assert "KeyboardInterrupt: no" in box.call("interrupt", {}).text
        assert "ValueError: caf\ufffd" in box.call("broken_text", {}).text
        assert box.call("text", {}) == ToolResult(Outcome.DONE, "caf\ufffd.txt")
        assert box.call("names", {}) == ToolResult(Outcome.DONE, '["caf\ufffd.txt", "ok"]')
        assert box.call("iterator", {}) == ToolResult(Outcome.DONE, '["1","2"]')
        assert box.call("function_without_def", {}) == ToolResult(Outcome.DONE, "by its name in the file")


@given(
    kind=st.sampled_from(["", "/", "*", "**"]),
    annotation=st.sampled_from(["", ": int", ": list[str]", ": 'Nothing'", ": bytes", ": type(sys)", ": 5", ": print"]),
    default=st.sampled_from(["", " = None", " = sys", " = print"]),
    body=st.sampled_from(["return 1", "yield 1"]),
    is_async=st.booleans(),
)
def test_a_function_of_any_signature_is_added_or_refused_by_line_and_name(
    kind: str, annotation: str, default: str, body: str, is_async: bool
) -> None:
    match kind:
        case "*" | "**":
            parameter = f"{kind}value{annotation}"
        case "/":
            parameter = f"value{annotation}{default}, /"
        case _:
            parameter = f"value{annotation}{default}"
    source = f"import sys\n{'async ' * is_async}def f({parameter}):\n    {body}\n"
    names: dict[str, Any] = {}
    try:
        exec(compile(source, "mine.py", "exec"), names)
    except TypeError:
        return  # Python cannot evaluate the annotation: such a module cannot be imported
    try:
        _add_tool(MCPServer("tools", log_level="ERROR"), "f", names["f"])
    except UnusableFunction as error:
        assert str(error).startswith("line 2: f: ")
    else:
        assert kind == ""
        assert body == "return 1"


PROGRAM = """
import os, sys, pathlib
from mlx_k2.tools.servers import python_module
from mlx_k2.tools.toolbox import Limits, open_toolbox
with open_toolbox([python_module(pathlib.Path(sys.argv[1]), os.environ)], Limits()) as box:
    box.start("hang", {})
    box.call("weather", {"city": "Rome"})
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_tool_server_processes_end_when_the_program_is_killed(module: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(module)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"ready\n"
        servers = psutil.Process(program.pid).children(recursive=True)
        program.kill()
        assert servers
        _, running = psutil.wait_procs(servers, timeout=60)
    assert running == []
