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

# Text of an attacker: names of control tokens, complete and in parts, and characters of the private-use planes.
hostile_texts = st.lists(
    st.one_of(
        st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", "|", ">", "im_end", "<think>", "</think>", "[EOS", "]"]),
        st.sampled_from(["<|reserved_token_", "799", "|>", "\U0010fffd", "\U0010fff0", "{{", "}}", "\n", "None", "汉"]),
        st.text(max_size=3),
    ),
    max_size=5,
).map("".join)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), hostile_texts),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(hostile_texts, inner, max_size=2)),
    max_leaves=4,
)
functions = st.fixed_dictionaries(
    {"name": hostile_texts, "arguments": st.one_of(hostile_texts, st.dictionaries(hostile_texts, json_values))}
)
calls = st.fixed_dictionaries({"id": hostile_texts, "type": hostile_texts, "function": functions})
messages = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user"]), "content": hostile_texts}, optional={"name": hostile_texts}
    ),
    st.fixed_dictionaries(
        {
            "role": st.just("user"),
            "content": st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": hostile_texts})),
        }
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": hostile_texts},
        optional={"reasoning_content": hostile_texts, "tool_calls": st.lists(calls, max_size=2), "name": hostile_texts},
    ),
    st.fixed_dictionaries({"role": st.just("tool"), "tool_call_id": hostile_texts, "content": hostile_texts}),
)
conversations = st.lists(messages, min_size=1, max_size=4)
declared_tools = st.lists(st.dictionaries(hostile_texts, json_values, max_size=3), max_size=2)


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
    """Return the conversation with all text replaced by as much harmless text, except roles and functions' names."""
    messages = copy.deepcopy(conversation)
    for message in messages:
        for name in message.keys() - {"role", "tool_calls", "content"}:
            message[name] = harmless(message[name])
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        message["content"] = harmless(text)
        for call in message.get("tool_calls", []):
            call["id"] = harmless(call["id"])
            call["function"]["arguments"] = harmless(call["function"]["arguments"])
    return messages


def control_ids(conversation: Any, tools: Any = None) -> list[int]:
    """Return the control tokens of a prompt with the built-in template."""
    ids = ids_of(builtin_template(), tokenizer(), conversation, tools)
    return [token_id for token_id in ids if tokenizer().is_special(token_id)]


@given(conversations, declared_tools)
def test_a_hostile_conversation_has_the_same_control_tokens_as_a_harmless_one(conversation: Any, tools: Any) -> None:
    assert control_ids(conversation, tools) == control_ids(harmless_messages(conversation), harmless(tools))


@given(conversations, declared_tools)
def test_a_prompt_decodes_to_the_rendering_of_unescaped_text_byte_for_byte(conversation: Any, tools: Any) -> None:
    """A prompt is rendered twice, first with unescaped text."""
    pieces = pieces_of(builtin_template(), tokenizer(), conversation, tools)
    renderings: list[str] = []

    class Recorder(ChatTemplate):
        def render(self, variables: Any) -> str:
            renderings.append(super().render(variables))
            return renderings[-1]

    pieces_of(Recorder(builtin_template().source), tokenizer(), conversation, tools)
    assert as_text(pieces) == renderings[0]
    assert decode(encode_pieces(tokenizer(), pieces)) == renderings[0]


# A prompt is searched in windows of 16,384 characters: some control tokens begin in one window and end in the next.
@given(st.lists(st.integers(16_350, 16_390), min_size=1, max_size=3), st.sampled_from(["<|im_end|>", "[EOS]"]))
def test_control_tokens_are_found_everywhere_in_a_long_prompt(lengths: list[int], name: str) -> None:
    template = ChatTemplate("{% for message in messages %}{{ message.content }}" + name + "{% endfor %}")
    conversation = [{"role": "user", "content": "x" * length} for length in lengths]
    expected = [piece for length in lengths for piece in ("x" * length, tokenizer().token_id(name))]
    assert pieces_of(template, tokenizer(), conversation) == expected


@given(conversations)
def test_text_between_control_tokens_is_one_piece(conversation: Any) -> None:
    pieces = pieces_of(builtin_template(), tokenizer(), conversation)
    types = [type(piece) for piece in pieces]
    assert (str, str) not in itertools.pairwise(types)
    assert "" not in pieces


def test_a_control_token_spelled_in_a_message_is_encoded_as_text() -> None:
    ids = ids_of(builtin_template(), tokenizer(), [{"role": "user", "content": "a<|im_end|>b"}])
    assert ids.count(tokenizer().token_id("<|im_end|>")) == 2, (
        "not one after the system prompt and one after the message"
    )
    assert "<|im_user|>user<|im_middle|>a<|im_end|>b<|im_end|>" in decode(ids)


def test_a_word_formed_across_two_messages_and_the_template_is_one_token() -> None:
    template = ChatTemplate("<|im_user|>{{ messages[0].content }}t{{ messages[1].content }}")
    conversation = [{"role": "user", "content": " wa"}, {"role": "user", "content": "er"}]
    ids = ids_of(template, tokenizer(), conversation)
    assert ids == [tokenizer().token_id("<|im_user|>"), *tokenizer().encode_text(" water")]
    assert len(ids) == 2


# Templates that without escaping could turn message text into control tokens, by the method.
JOINING_TEMPLATES = {
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
    "without separators": "{{ messages[0].content.replace('x', '') }}{{ messages[1].content.strip('x') }}",
    "split at separators": "{{ messages[0].content.split('</think>')[-1] }}{{ messages[1].content.split()|join }}",
    "backwards": "{{ messages[0].content[::-1] }}{{ messages[1].content | reverse }}",
    "letter by letter": "{% for c in messages[0].content %}{{ c }}{% endfor %}{{ messages[1].content | list | join }}",
    "in lower case": "{{ messages[0].content | lower }}{{ messages[1].content.lower() }}",
    "as ASCII JSON": "{{ messages[0].content | tojson(ensure_ascii=true) }}{{ messages | tojson(true, 1) }}",
    "as JSON": "{{ messages[0].content | tojson }}{{ messages | tojson(indent=1) }}",
    "as Python writes it": "{{ [messages[0].content] }}{{ messages[1] }}",
    "in a macro": "{% macro m(t) %}<|{{ t }}{% endmacro %}{{ m(messages[0].content) }}|>{{ m('im_end') }}|>",
    "set by a block": "{% set t %}<|{{ messages[0].content }}{% endset %}{{ t }}|>",
    "indented": "{{ messages[0].content | indent(2, true) }}",
    "sliced": "<|im_{{ messages[0].content[:3] }}|>{{ messages[0].content[0] }}",
    "as a key": "{% for k, v in {messages[0].content: 'end|>'}.items() %}{{ k }}{{ v }}{% endfor %}",
    "as an attribute": "{{ messages[0].name }}<|{{ messages[0]['name'] }}|>",
}
short_texts = st.one_of(
    hostile_texts,
    st.sampled_from(["end", "<|im_end|>", "<|im_", "|>", "x", "<|", "|>dne_mi|<", "<|IM_END|>", "<x|im_end|>"]),
)


@pytest.mark.parametrize("source", JOINING_TEMPLATES.values(), ids=JOINING_TEMPLATES.keys())
@settings(max_examples=scaled(40))
@given(first=short_texts, second=short_texts)
def test_no_template_lets_text_become_a_control_token(source: str, first: str, second: str) -> None:
    conversation = [{"role": "user", "content": first, "name": first}, {"role": "user", "content": second}]
    pieces = pieces_of(ChatTemplate(source), tokenizer(), conversation)
    # The template "in a macro" writes one <|im_end|> itself.
    ids_of_the_template = [tokenizer().token_id("<|im_end|>")] if "m('im_end')" in source else []
    assert [piece for piece in pieces if isinstance(piece, int)] == ids_of_the_template


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
        "{% if option == 'HERE' %}<|im_user|>{% endif %}",
    ],
)
def test_control_tokens_spelled_by_the_template_become_control_tokens(source: str) -> None:
    pieces = pieces_of(ChatTemplate(source), tokenizer(), [{"role": "user", "content": "HERE"}], option="HERE")
    assert [piece for piece in pieces if isinstance(piece, int)] == [tokenizer().token_id("<|im_user|>")]


def test_a_template_that_behaves_differently_on_escaped_text_is_refused() -> None:
    # Python searches the template's plain text for the escaped characters, and does not find them.
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
    """Return the prompt of a template that writes only the declaration of one tool."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "é": "<|im_end|>"}}}
    (piece,) = pieces_of(ChatTemplate(source), tokenizer(), [{"role": "user"}], [tool])
    return str(piece)


def test_keys_of_tools_are_sorted_only_for_a_template_with_think_tokens_or_typescript() -> None:
    unsorted = '[{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "é": "<|im_end|>"}}}]'
    assert declaration("{{ tools | tojson }}") == unsorted
    sorted_keys = '[{"function":{"name":"f","parameters":{"type":"object","é":"<|im_end|>"}},"type":"function"}]'
    assert declaration("{{ tools | tojson(separators=(',', ':')) }}{# <think> #}") == sorted_keys
    assert declaration("{{ tools | tojson(separators=(',', ':')) }}{% if tools_ts_str %}{% endif %}") == sorted_keys


def test_a_template_that_reads_tools_ts_str_gets_it_only_where_all_tools_have_a_typescript_form() -> None:
    template = ChatTemplate("{% if tools_ts_str %}{{ tools_ts_str }}{% else %}{{ tools_ts_str is defined }}{% endif %}")
    tool = {"type": "function", "function": {"name": "f"}}
    malformed_tool = {"type": "function", "function": 3}
    expected = "# Tools\n\n## functions\nnamespace functions {\ntype f = (_: {}) => any;\n}\n"
    assert pieces_of(template, tokenizer(), [{"role": "user"}], [tool]) == [expected]
    assert pieces_of(template, tokenizer(), [{"role": "user"}], [tool, malformed_tool]) == ["False"]
    assert pieces_of(template, tokenizer(), [{"role": "user"}]) == ["False"]


@pytest.mark.parametrize("tool", ["f", None, 3, ["f"]])
def test_a_tool_that_is_not_an_object_is_refused(tool: Any) -> None:
    with pytest.raises(RequestError, match="tool 2 is not an object"):
        ids_of(builtin_template(), tokenizer(), [{"role": "user"}], [{}, tool])


def test_strftime_now_has_the_same_time_in_both_renderings_of_a_prompt() -> None:
    """Else the two differ, and the template is refused."""
    (piece,) = pieces_of(ChatTemplate("{{ strftime_now('%Y %f') }}"), tokenizer(), [{"role": "user"}])
    assert str(piece).split()[0].isdigit()


def test_a_malformed_message_is_refused() -> None:
    with pytest.raises(RequestError, match="message 1 has the role"):
        ids_of(builtin_template(), tokenizer(), [{"role": "wizard", "content": "x"}])


def test_messages_in_openais_format_are_read_before_they_are_rendered() -> None:
    template = builtin_template()
    history: list[dict[str, object]] = [{"role": "developer", "content": ["a"]}, {"role": "user", "content": "b"}]
    messages = read_history(history, template.fields).messages
    assert render_pieces(template, tokenizer(), history) == render_pieces(template, tokenizer(), messages)
    with pytest.raises(RequestError, match="message 2 has the role 'wizard'"):
        render_pieces(template, tokenizer(), [messages[1], {"role": "wizard", "content": "a"}])
