import json
from typing import Any

import pytest

from mlx_k2.errors import RequestError, TokenizerError
from mlx_k2.text.chat_template import ChatTemplate, load_chat_template

ENDLESS = {
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
    return ChatTemplate(source, max_cpu_s=0.2, max_characters=100_000).render(variables)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_that_runs_away_is_stopped_at_its_line(source: str) -> None:
    with pytest.raises(TokenizerError, match=r"^chat_template.jinja line 2: "):
        render(source, t="a" * 999)


def test_a_template_that_writes_without_end_is_stopped() -> None:
    with pytest.raises(TokenizerError, match=r"wrote more than 100000 characters"):
        render("{% for a in range(99999) %}{{ 'much text' }}{% endfor %}")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("\n\n{% if %}", "line 3: Expected an expression"),
        ("\n{{ messages[0].text.length }}", "line 2: 'dict object' has no attribute 'text'"),
        ("{{ 1 // 0 }}", "line 1: integer division or modulo by zero"),
        ("\n{{ ''.__class__.__mro__ }}", "line 2: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "line 1: access to attribute 'append'"),
        ("{{ messages | shout }}", "line 1: No filter named 'shout'"),
        ("{% include 'other' %}", "line 1: no loader"),
        ("{{ messages | tojson }}{{ tojson }}{{ {1: ''.join} | tojson }}", "line 1: .*not JSON serializable"),
    ],
)
def test_a_template_that_fails_is_named_with_its_line(source: str, complaint: str) -> None:
    with pytest.raises(TokenizerError, match=f"^chat_template.jinja {complaint}"):
        render(source, messages=[{}])


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


def test_blocks_leave_no_space_behind() -> None:
    assert render("a\n  {% if true %}\nb\n  {% endif %}\nc\n") == "a\nb\nc"


def test_loops_can_be_left_and_turns_skipped() -> None:
    source = (
        "{% for x in range(9) %}{% if x == 1 %}{% continue %}{% elif x == 4 %}{% break %}{% endif %}{{ x }}{% endfor %}"
    )
    assert render(source) == "023"


def test_tilde_joins_as_jinja_does() -> None:
    assert render("{{ 1 ~ 'a' ~ none ~ nothing ~ [1, 'b'] ~ true }}") == "1aNone[1, 'b']True"
    assert render("{{ (1 + 2) ~ (2 * 3) ~ [1] * 2 ~ 'ab' * 2 }}") == "36[1, 1]abab"


def test_json_is_written_as_chat_templates_expect() -> None:
    value = {"b": "é<&'>", "a": [1, None]}
    assert render("{{ v | tojson }}", v=value) == """{"b": "é<&'>", "a": [1, null]}"""
    assert render("{{ v | tojson(separators=(',', ':')) }}", v=value) == """{"b":"é<&'>","a":[1,null]}"""
    assert render("{{ v | tojson(sort_keys=true) }}", v=value) == """{"a": [1, null], "b": "é<&'>"}"""
    assert render("{{ v | tojson(indent=1) }}", v=[1]) == "[\n 1\n]"


def test_the_template_is_read_from_its_file_before_the_tokenizers_config() -> None:
    config = json.dumps({"chat_template": "from the config"}).encode()
    assert load_chat_template({"tokenizer_config.json": config}).source == "from the config"
    both = {"tokenizer_config.json": config, "chat_template.jinja": "from the file é".encode()}
    assert load_chat_template(both).source == "from the file é"


def test_of_several_templates_the_default_one_is_taken() -> None:
    templates = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    files = {"tokenizer_config.json": json.dumps({"chat_template": templates}).encode()}
    assert load_chat_template(files).source == "D"


def test_a_template_can_write_the_tokens_that_the_config_names() -> None:
    config = {"chat_template": "{{ bos_token }}{{ eos_token }}", "bos_token": "[B]", "eos_token": {"content": "[E]"}}
    assert load_chat_template({"tokenizer_config.json": json.dumps(config).encode()}).render({}) == "[B][E]"


@pytest.mark.parametrize(
    "files",
    [{}, {"tokenizer_config.json": b"{}"}, {"tokenizer_config.json": b'{"chat_template": [{"name": "rag"}]}'}],
)
def test_a_model_without_a_template_points_to_raw_prompts(files: dict[str, bytes]) -> None:
    with pytest.raises(TokenizerError, match=r"no chat template: give --raw"):
        load_chat_template(files)


@pytest.mark.parametrize("files", [{"chat_template.jinja": b"\xff"}, {"tokenizer_config.json": b"{"}])
def test_an_unreadable_template_is_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(TokenizerError, match=r"the chat template cannot be read"):
        load_chat_template(files)
