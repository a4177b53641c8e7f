"""Tests of chat templates: their dialect of Jinja, their limits, their errors, and the process that renders them."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlx_k2.errors import RequestError, TokenizerError
from mlx_k2.text.chat_template import ChatTemplate, load_chat_template

COSTLY_TEMPLATES = {
    "nested loops": "\n{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop in a macro": "\n{% macro m() %}{% for a in range(99999) %}{{ m() }}{% endfor %}{% endmacro %}{{ m() }}",
    "macros that call themselves": "\n{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loops": "\n{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "doubling by ~": "{% set n = namespace(t=t) %}\n{% for _ in range(9) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
    "doubling by +": "{% set n = namespace(t=t) %}\n{% for _ in range(9) %}{% set n.t = n.t + n.t %}{% endfor %}",
    "text times a number": "\n{{ 'a' * 1000000000000 }}",
    "a number times a list": "\n{{ 1000000000000 * [0] }}",
    "a power": "\n{{ 9 ** 9 ** 9 }}",
    "a range": "\n{{ range(1000000000) | list }}",
}


def render(source: str, **variables: Any) -> str:
    """Render a template with limits that are low enough for a test. 0.2 s of CPU time are named in messages below."""
    return ChatTemplate(source, max_cpu_s=0.2, max_characters=100_000).render(variables)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("source", COSTLY_TEMPLATES.values(), ids=COSTLY_TEMPLATES.keys())
def test_a_template_that_needs_too_much_cpu_or_memory_is_stopped_and_its_line_named(source: str) -> None:
    with pytest.raises(TokenizerError, match=r"^chat_template.jinja line 2: "):
        render(source, t="a" * 999)


def test_a_template_that_writes_over_100000_characters_is_stopped() -> None:
    with pytest.raises(TokenizerError, match=r"wrote more than 100000 characters"):
        render("{% for a in range(99999) %}{{ 'much text' }}{% endfor %}")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("\n\n{% if %}", "line 3: Expected an expression"),
        ("\n{{ messages[0].text.length }}", "line 2: 'dict object' has no attribute 'text'"),
        ("{{ 1 // 0 }}", "line 1: integer division or modulo by zero"),
        ("\n{{ ''.__class__.__mro__ }}", "line 2: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "line 1: access to attribute 'append'"),
        ("{{ messages | shout }}", "line 1: No filter named 'shout'"),
        ("{% include 'other' %}", "line 1: no loader"),
        ("{{ {1: ''.join} | tojson }}", "line 1: .*not JSON serializable"),
    ],
)
def test_a_template_error_names_the_file_and_line(source: str, error: str) -> None:
    with pytest.raises(TokenizerError, match=f"^chat_template.jinja {error}"):
        render(source, messages=[{}])


def test_raise_exception_in_a_template_is_a_request_error() -> None:
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_lines_with_only_a_block_tag_render_nothing() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc\n") == "a\nb\nc"


def test_loops_support_break_and_continue() -> None:
    source = (
        "{% for x in range(9) %}{% if x == 1 %}{% continue %}{% elif x == 4 %}{% break %}{% endif %}{{ x }}{% endfor %}"
    )
    assert render(source) == "023"


def test_tilde_joins_values_like_jinja() -> None:
    assert render("{{ 1 ~ 'a' ~ none ~ nothing ~ [1, 'b'] ~ true }}") == "1aNone[1, 'b']True"
    assert render("{{ (1 + 2) ~ (2 * 3) ~ [1] * 2 ~ 'ab' * 2 }}") == "36[1, 1]abab"


def test_tojson_writes_json_like_hugging_face_chat_templates() -> None:
    value = {"b": "é<&'>", "a": [1, None]}
    assert render("{{ v | tojson }}", v=value) == """{"b": "é<&'>", "a": [1, null]}"""
    assert render("{{ v | tojson(separators=(',', ':')) }}", v=value) == """{"b":"é<&'>","a":[1,null]}"""
    assert render("{{ v | tojson(sort_keys=true) }}", v=value) == """{"a": [1, null], "b": "é<&'>"}"""
    assert render("{{ v | tojson(indent=1) }}", v=[1]) == "[\n 1\n]"
    assert render("{{ v | tojson(false, none, (',', ':'), true) }}", v=value) == """{"a":[1,null],"b":"é<&'>"}"""


def test_tojson_escapes_non_ascii_characters_only_with_ensure_ascii() -> None:
    value = {"é": "汉😀\n\u2028\x7f"}
    assert render("{{ v | tojson(ensure_ascii=False) }}", v=value) == json.dumps(value, ensure_ascii=False)
    assert render("{{ v | tojson(ensure_ascii=True) }}", v=value) == json.dumps(value)


def test_a_generation_block_renders_its_body_in_a_separate_scope() -> None:
    source = (
        "{% set x = 1 %}{% for y in v %}{% generation %}{% set x = y %}<{{ x }}>{% endgeneration %}{% endfor %}{{ x }}"
    )
    assert render(source, v=["a", "b"]) == "<a><b>1"
    assert render("a\n{% generation %}\nb\n{% endgeneration %}\nc") == "a\nb\nc"


def test_a_generation_block_without_an_end_is_refused_with_its_line() -> None:
    with pytest.raises(TokenizerError, match=r"^chat_template.jinja line 2: .*endgeneration"):
        render("\n{% generation %}x")


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("{{ messages }}{{ tools }}{{ documents }}{{ bos_token }}{{ strftime_now('%Y') }}{{ thinking }}", None),
        ("{% for m in messages %}{% set x = m %}{{ x }}{{ loop.index }}{% endfor %}", None),
        (
            "{% if tools %}{% set x = 1 %}{% endif %}{{ x }}{% macro f(a) %}{{ a }}{% endmacro %}",
            None,
        ),
        ("{{ namespace(a=1) }}{{ range(3) }}{{ raise_exception }}", None),
        ("{% if enable_thinking is defined %}{% endif %}{{ builtin_tools }}", "builtin_tools, enable_thinking"),
        ("{% set effort = effort | default('high') %}{{ effort }}", "effort"),
    ],
)
def test_a_warning_names_the_variables_that_nothing_sets(source: str, names: str | None) -> None:
    warning = f"the chat template reads variables that mlx-k2 does not set: {names}"
    assert ChatTemplate(source).warnings == ((warning,) if names else ())


def test_chat_template_jinja_overrides_the_template_in_tokenizer_config() -> None:
    config = json.dumps({"chat_template": "from the config"}).encode()
    assert load_chat_template({"tokenizer_config.json": config}).source == "from the config"
    files = {"tokenizer_config.json": config, "chat_template.jinja": "from the file é".encode()}
    assert load_chat_template(files).source == "from the file é"


def test_a_byte_order_mark_before_a_template_is_no_part_of_it() -> None:
    assert load_chat_template({"chat_template.jinja": b"\xef\xbb\xbf{{ 1 }}"}).render({}) == "1"
    config = json.dumps({"chat_template": "\ufeff{{ 2 }}"}).encode()
    assert load_chat_template({"tokenizer_config.json": config}).render({}) == "2"


def test_the_default_template_is_used_among_several() -> None:
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    files = {"tokenizer_config.json": json.dumps({"chat_template": templates}).encode()}
    assert load_chat_template(files).source == "D"


def test_a_template_can_use_bos_token_and_eos_token_of_the_config() -> None:
    config = {"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": "[B]", "eos_token": {"content": "[E]"}}
    assert load_chat_template({"tokenizer_config.json": json.dumps(config).encode()}).render({}) == "[B][E]"


@pytest.mark.parametrize(
    "files",
    [{}, {"tokenizer_config.json": b"{}"}, {"tokenizer_config.json": b'{"chat_template": [{"name": "rag"}]}'}],
)
def test_a_model_without_a_template_is_refused_with_a_hint_at_raw(files: dict[str, bytes]) -> None:
    with pytest.raises(TokenizerError, match=r"no chat template: give --raw"):
        load_chat_template(files)


@pytest.mark.parametrize("files", [{"chat_template.jinja": b"\xff"}, {"tokenizer_config.json": b"{"}])
def test_an_unreadable_template_is_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(TokenizerError, match=r"the chat template cannot be read"):
        load_chat_template(files)


EVASIVE_TEMPLATES = {
    "assignments to names with the program's prefix": (  # a limit inside the compiled template could have such names
        "\n{% set mlx_k2_on_turn = dict %}{% set mlx_k2_on_iteration = dict %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "straight-line code": "\n{% set x = 3 %}" + "{% set x = x * x %}" * 60,
    "a filter that loops": "\n{{ range(99999) | map('center', 99999) | map('length') | list }}",
    "a text format": "\n{{ '%4000000000d' % 1 }}",
    "a padded text": "\n{{ 'a' | center(4000000000) }}",
    "a method that pads": "\n{{ 'a'.ljust(4000000000) }}",
    "an indented JSON": "\n{{ [[1]] | tojson(indent=4000000000) }}",
    "replacements": "\n{% set n = namespace(t='a' * 50000) %}{% set n.t = n.t.replace('a', n.t).replace('a', n.t) %}",
}


@pytest.mark.timeout(40)
@pytest.mark.parametrize("source", EVASIVE_TEMPLATES.values(), ids=EVASIVE_TEMPLATES.keys())
def test_no_template_avoids_the_limits_on_cpu_and_memory(source: str) -> None:
    with pytest.raises(
        TokenizerError, match=r"did not end within 0.2 s|needs more memory|computes a power|makes a text"
    ):
        render(source)
    assert render("{{ 1 + 1 }}") == "2"


@pytest.mark.parametrize("source", ["{{ name }}" * 100_000, "{{ x.y['z'] }}" * 100_000], ids=["variables", "fields"])
def test_a_template_is_compiled_and_its_names_are_collected_under_the_same_limit(source: str) -> None:
    # The line is named if the limit is reached in Jinja's lexer, which converts exceptions to syntax errors.
    with pytest.raises(TokenizerError, match=r"^chat_template.jinja( line 1)?: did not end within 0.2 s of computing$"):
        ChatTemplate(source, max_cpu_s=0.2)


def test_names_with_quotes_and_letters_of_all_scripts_are_returned_and_lone_surrogates_are_not() -> None:
    template = ChatTemplate("{{ größe.x['\"\\n'] }}{{ y['\\U0001f600'] }}{{ y['\\ud800'] }}")
    assert template.variables == {"größe", "y"}
    assert template.fields == {"x", '"\n', "\U0001f600"}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "is nested too deep"),
        ("{% for a in [1] %}" * 30 + "{% endfor %}" * 30, "too many"),
        ("{{ '\\ud800' }}{{ x.y.z }}", "'x' is undefined"),
    ],
)
def test_a_template_that_cannot_be_compiled_or_rendered_is_a_tokenizer_error(source: str, problem: str) -> None:
    with pytest.raises(TokenizerError, match=f"^chat_template.jinja.*: .*{problem}"):
        render(source)


def test_a_text_with_a_lone_surrogate_is_rendered() -> None:
    assert render("{{ '\\ud800' }}{{ x }}", x="\udc00") == "\ud800\udc00"


@pytest.mark.timeout(40)
def test_other_threads_run_while_a_template_computes_in_one_long_call() -> None:
    thread = threading.Thread(
        target=pytest.raises, args=(TokenizerError, render, EVASIVE_TEMPLATES["straight-line code"])
    )
    thread.start()
    longest_wait_s = 0.0
    while thread.is_alive():
        started_at = time.monotonic()
        thread.join(0.001)
        longest_wait_s = max(longest_wait_s, time.monotonic() - started_at)
    assert longest_wait_s < 0.5, f"this thread waited {longest_wait_s} s for the interpreter's lock"


@pytest.mark.timeout(40)
def test_a_worker_that_was_killed_is_started_again() -> None:
    assert render("{{ 1 }}") == "1"
    children = psutil.Process().children()
    (worker,) = [process for process in children if "mlx_k2.text.template_worker" in process.cmdline()]
    worker.kill()
    while worker.status() != psutil.STATUS_ZOMBIE:
        threading.Event().wait(0.01)
    assert render("{{ 1 }}") == "1"


def has_mark(process: psutil.Process, mark: str) -> bool:
    """Return whether the test marked the process, or a process that started it, by an environment variable."""
    try:
        return process.environ().get("MLX_K2_TEST_MARK") == mark
    except psutil.Error:
        return False


@pytest.mark.timeout(40)
@pytest.mark.parametrize(("end", "exit_code"), [("pass", 0), ("os.kill(os.getpid(), 9)", -9)], ids=["exit", "SIGKILL"])
def test_the_worker_ends_with_the_program(end: str, exit_code: int, tmp_path: Path) -> None:
    program = f"from mlx_k2.text.chat_template import ChatTemplate; ChatTemplate('a'); import os; {end}"
    mark = str(tmp_path)
    environment = {**os.environ, "MLX_K2_TEST_MARK": mark}
    assert subprocess.run([sys.executable, "-c", program], timeout=20, env=environment).returncode == exit_code
    deadline = time.monotonic() + 10
    while any(has_mark(process, mark) for process in psutil.process_iter()):
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)
