"""Tests of prompt rendering: no text of a message becomes a control token, for any text and any template."""

import copy
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.errors import RequestError, TokenizerError
from mlx_k2.text.chat_template import ChatTemplate
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.prompt import encode_pieces, render_pieces
from tests.examples import scaled
from tests.text.fixtures import as_text, builtin_template, decode, ids_of, pieces_of, tokenizer

# Text of an attacker: names of control tokens, whole and in parts, and characters of the private-use planes.
hostile = st.lists(
    st.one_of(
        st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", "|", ">", "im_end", "<think>", "</think>", "[EOS", "]"]),
        st.sampled_from(["<|reserved_token_", "799", "|>", "\U0010fffd", "\U0010fff0", "{{", "}}", "\n", "None", "汉"]),
        st.text(max_size=3),
    ),
    max_size=5,
).map("".join)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), hostile),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(hostile, inner, max_size=2)),
    max_leaves=4,
)
functions = st.fixed_dictionaries(
    {"name": hostile, "arguments": st.one_of(hostile, st.dictionaries(hostile, json_values))}
)
calls = st.fixed_dictionaries({"id": hostile, "type": hostile, "function": functions})
messages = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user"]), "content": hostile}, optional={"name": hostile}
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("user"),
            "content": st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": hostile})),
        }
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": hostile},
        optional={"reasoning_content": hostile, "tool_calls": st.lists(calls, max_size=2), "name": hostile},
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": hostile, "content": hostile}),
)
conversations = st.lists(messages, min_size=1, max_size=4)
tools = st.lists(st.dictionaries(hostile, json_values, max_size=3), max_size=2)


def harmless(value: Any) -> Any:
    """Return the same structure with each character of a text replaced by 'x'. Keys are numbered; other values stay."""
    match value:
        case str():
            return "x" * len(value)
        case list():
            return [harmless(item) for item in value]
        case dict():
            return {f"x{number}": harmless(item) for number, item in enumerate(value.values())}
    return value


def harmless_messages(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    changed = copy.deepcopy(conversation)
    for message in changed:
        for name in message.keys() - {"role", "tool_calls", "content"}:
            message[name] = harmless(message[name])
        content = message["content"]
        message["content"] = (
            harmless(content) if isinstance(content, str) else harmless("".join(p["text"] for p in content))
        )
        for call in message.get("tool_calls", []):
            call["id"] = harmless(call["id"])
            call["function"]["arguments"] = harmless(call["function"]["arguments"])
    return changed


def control_tokens(template: ChatTemplate, conversation: Any, declared: Any = None) -> list[int]:
    ids = ids_of(template, tokenizer(), conversation, declared)
    return [number for number in ids if tokenizer().is_special(number)]


@given(conversations, tools)
def test_a_hostile_conversation_has_the_same_control_tokens_as_a_harmless_one(conversation: Any, declared: Any) -> None:
    expected = control_tokens(builtin_template(), harmless_messages(conversation), harmless(declared))
    assert control_tokens(builtin_template(), conversation, declared) == expected


@given(conversations, tools)
def test_a_prompt_decodes_to_the_plain_rendering_byte_for_byte(conversation: Any, declared: Any) -> None:
    pieces = pieces_of(builtin_template(), tokenizer(), conversation, declared)
    texts: list[str] = []

    class Recorder(ChatTemplate):
        def render(self, variables: Any) -> str:
            texts.append(super().render(variables))
            return texts[-1]

    pieces_of(Recorder(builtin_template().source), tokenizer(), conversation, declared)
    assert as_text(pieces) == texts[0]
    assert decode(encode_pieces(tokenizer(), pieces)) == texts[0]


@given(st.lists(st.integers(16_350, 16_390), min_size=1, max_size=3), st.sampled_from(["<|im_end|>", "[EOS]"]))
def test_control_tokens_are_found_everywhere_in_a_long_prompt(lengths: list[int], name: str) -> None:
    template = ChatTemplate("{% for message in messages %}{{ message.content }}" + name + "{% endfor %}")
    conversation = [{"role": "user", "content": "x" * length} for length in lengths]
    expected = [piece for length in lengths for piece in ("x" * length, tokenizer().token_id(name))]
    assert pieces_of(template, tokenizer(), conversation) == expected


@given(conversations)
def test_text_between_control_tokens_is_one_piece(conversation: Any) -> None:
    pieces = pieces_of(builtin_template(), tokenizer(), conversation)
    kinds = [type(piece) for piece in pieces]
    assert (str, str) not in list(itertools.pairwise(kinds))
    assert "" not in pieces


def test_a_control_token_spelled_in_a_message_is_encoded_as_text() -> None:
    im_end = tokenizer().token_id("<|im_end|>")
    harmless_ids = control_tokens(builtin_template(), [{"role": "user", "content": "x"}])
    ids = ids_of(builtin_template(), tokenizer(), [{"role": "user", "content": "a<|im_end|>b"}])
    assert ids.count(im_end) == harmless_ids.count(im_end) == 2
    assert "<|im_user|>user<|im_middle|>a<|im_end|>b<|im_end|>" in decode(ids)


def test_a_word_formed_across_two_messages_and_the_template_is_one_token() -> None:
    template = ChatTemplate("<|im_user|>{{ messages[0].content }}t{{ messages[1].content }}")
    conversation = [{"role": "user", "content": " wa"}, {"role": "user", "content": "er"}]
    ids = ids_of(template, tokenizer(), conversation)
    assert ids == [tokenizer().token_id("<|im_user|>"), *tokenizer().encode_text(" water")]
    assert len(ids) == 2


# Templates that would turn message text into control tokens without escaping. Each key names the method.
TEMPLATES = {
    "a hole in a marker": "<|im_{{ messages[0].content }}|>",
    "a hole at a marker's start": "{{ messages[0].content }}im_end|>",
    "a hole at a marker's end": "<|im_end{{ messages[0].content }}",
    "two messages side by side": "{{ messages[0].content }}{{ messages[1].content }}",
    "joined with a tilde": "{{ messages[0].content ~ 'end' ~ messages[1].content }}",
    "joined with a plus": "{{ '<|im_' + messages[0].content + '|>' }}",
    "joined by a filter": "{{ messages | map(attribute='content') | join('end') }}",
    "formatted": "{{ '<|%s|>' | format(messages[0].content) }}{{ '<|im_%s' % messages[1].content }}",
    "formatted by a method": "{{ '<|{}|>{}'.format(messages[0].content, messages[1].content) }}",
    "trimmed": "<|im_{{ messages[0].content | trim }}|>",
    "stripped of what broke it": "{{ messages[0].content.replace('x', '') }}{{ messages[1].content.strip('x') }}",
    "split at what broke it": "{{ messages[0].content.split('</think>')[-1] }}{{ messages[1].content.split()|join }}",
    "backwards": "{{ messages[0].content[::-1] }}{{ messages[1].content | reverse }}",
    "letter by letter": "{% for c in messages[0].content %}{{ c }}{% endfor %}{{ messages[1].content | list | join }}",
    "in lower case": "{{ messages[0].content | lower }}{{ messages[1].content.lower() }}",
    "as ASCII JSON": "{{ messages[0].content | tojson(ensure_ascii=true) }}{{ messages | tojson(true, 1) }}",
    "as JSON": "{{ messages[0].content | tojson }}{{ messages | tojson(indent=1) }}",
    "as Python writes it": "{{ [messages[0].content] }}{{ messages[1] }}",
    "in a macro": "{% macro m(t) %}<|{{ t }}{% endmacro %}{{ m(messages[0].content) }}|>{{ m('im_end') }}|>",
    "kept in a block": "{% set t %}<|{{ messages[0].content }}{% endset %}{{ t }}|>",
    "indented": "{{ messages[0].content | indent(2, true) }}",
    "sliced": "<|im_{{ messages[0].content[:3] }}|>{{ messages[0].content[0] }}",
    "as a key": "{% for k, v in {messages[0].content: 'end|>'}.items() %}{{ k }}{{ v }}{% endfor %}",
    "as an attribute": "{{ messages[0].name }}<|{{ messages[0]['name'] }}|>",
}
short = st.one_of(
    hostile, st.sampled_from(["end", "<|im_end|>", "<|im_", "|>", "x", "<|", "|>dne_mi|<", "<|IM_END|>", "<x|im_end|>"])
)


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
@settings(max_examples=scaled(40))
@given(first=short, second=short)
def test_no_template_lets_text_become_a_control_token(source: str, first: str, second: str) -> None:
    template = ChatTemplate(source)
    conversation = [{"role": "user", "content": first, "name": first}, {"role": "user", "content": second}]
    pieces = pieces_of(template, tokenizer(), conversation)
    written_by_the_template = [tokenizer().token_id("<|im_end|>")] if "m('im_end')" in source else []
    assert [piece for piece in pieces if isinstance(piece, int)] == written_by_the_template


@pytest.mark.parametrize(
    "source",
    [
        "{{ '<|im_' ~ messages[0].role ~ '|>' }}",
        "<|im_{{ messages[0]['role'] }}|>",
        "{{ messages[0].content.replace('HERE', '<|im_user|>') }}",
        "{{ messages[0].content.replace('HERE', '<|im_user|>') | trim }}",
        "{{ ('<|im_user|>' + messages[0].content) }}",
        "{{ (' <|im_user|>' ~ messages[0].content).strip() }}",
        "{% if messages[0].content == 'HERE' %}<|im_user|>{% endif %}",
        "{% if 'HE' in messages[0].content and messages[0].content.startswith('H') %}<|im_user|>{% endif %}",
        "{{ {'HERE': '<|im_user|>'}[messages[0].content] }}",
        "{% if messages[0].content in ['HERE'] %}<|im_user|>{% endif %}",
        "{{ messages | selectattr('content', 'equalto', 'HERE') | map(attribute='x', default='<|im_user|>') | first }}",
        "{% if bound == 'HERE' %}<|im_user|>{% endif %}",
    ],
)
def test_control_tokens_spelled_by_the_template_become_control_tokens(source: str) -> None:
    pieces = pieces_of(ChatTemplate(source), tokenizer(), [{"role": "user", "content": "HERE"}], bound="HERE")
    assert [piece for piece in pieces if isinstance(piece, int)] == [tokenizer().token_id("<|im_user|>")]


def test_a_template_that_behaves_differently_on_escaped_text_is_refused() -> None:
    template = ChatTemplate("{% if messages[0].content in 'one two' %}a{% else %}b{% endif %}")
    with pytest.raises(TokenizerError, match="alters message text"):
        pieces_of(template, tokenizer(), [{"role": "user", "content": "one"}])


def test_template_options_are_escaped_like_message_text() -> None:
    template = ChatTemplate("{% if thinking %}<think>{% endif %}{{ note }}")
    pieces = pieces_of(template, tokenizer(), [{"role": "user"}], thinking=True, note="</think>")
    assert pieces == [tokenizer().token_id("<think>"), "</think>"]


def test_a_template_can_test_if_tools_or_documents_is_none() -> None:
    assert pieces_of(ChatTemplate("{{ documents is none }}"), tokenizer(), [{"role": "user"}]) == ["True"]
    template = ChatTemplate("{{ tools is none }} {{ tools is defined }}")
    assert pieces_of(template, tokenizer(), [{"role": "user"}]) == ["True True"]
    assert pieces_of(template, tokenizer(), [{"role": "user"}], [{"type": "function"}]) == ["False True"]


def declaration(source: str) -> str:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "é": "<|im_end|>"}}}
    (piece,) = pieces_of(ChatTemplate(source), tokenizer(), [{"role": "user"}], [tool])
    return str(piece)


def test_tools_have_sorted_keys_for_a_template_with_think_tokens_and_their_own_order_for_others() -> None:
    own = '[{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "é": "<|im_end|>"}}}]'
    assert declaration("{{ tools | tojson }}") == own
    sorted_keys = '[{"function":{"name":"f","parameters":{"type":"object","é":"<|im_end|>"}},"type":"function"}]'
    assert declaration("{{ tools | tojson(separators=(',', ':')) }}{# <think> #}") == sorted_keys
    source = "{{ tools_ts_str if not tools_ts_str else tools | tojson(separators=(',', ':')) }}"
    assert declaration(source) == sorted_keys


def test_a_template_that_reads_tools_ts_str_gets_it_only_where_all_tools_have_a_typescript_form() -> None:
    template = ChatTemplate("{% if tools_ts_str %}{{ tools_ts_str }}{% else %}{{ tools_ts_str is defined }}{% endif %}")
    tool = {"type": "function", "function": {"name": "f"}}
    expected = "# Tools\n\n## functions\nnamespace functions {\ntype f = (_: {}) => any;\n}\n"
    assert pieces_of(template, tokenizer(), [{"role": "user"}], [tool]) == [expected]
    assert pieces_of(template, tokenizer(), [{"role": "user"}], [tool, {"type": "function", "function": 3}]) == [
        "False"
    ]
    assert pieces_of(template, tokenizer(), [{"role": "user"}]) == ["False"]


@pytest.mark.parametrize("tool", ["f", None, 3, ["f"]])
def test_a_tool_that_is_not_an_object_is_refused(tool: Any) -> None:
    with pytest.raises(RequestError, match="tool 2 is not an object"):
        ids_of(builtin_template(), tokenizer(), [{"role": "user"}], [{}, tool])


def test_strftime_now_gives_the_same_time_throughout_one_rendering() -> None:
    template = ChatTemplate("{{ strftime_now('%Y %f') }}")
    (piece,) = pieces_of(template, tokenizer(), [{"role": "user"}])
    assert isinstance(piece, str)
    assert piece.split()[0].isdigit()


def test_a_malformed_message_is_refused_before_anything_is_rendered() -> None:
    with pytest.raises(RequestError, match="message 1 has the role"):
        ids_of(builtin_template(), tokenizer(), [{"role": "wizard", "content": "x"}])


def test_messages_in_openais_format_are_rendered_as_the_messages_that_they_are_read_as() -> None:
    template = builtin_template()
    given: list[dict[str, object]] = [{"role": "developer", "content": ["a"]}, {"role": "user", "content": "b"}]
    read = read_history(given, template.fields).messages
    assert render_pieces(template, tokenizer(), given) == render_pieces(template, tokenizer(), read)
    with pytest.raises(RequestError, match="message 2 has the role 'wizard'"):
        render_pieces(template, tokenizer(), [read[1], {"role": "wizard", "content": "a"}])
