"""Tests that prompts equal those of the checkpoints' own tokenizers, in text and in token ids, for the whole family."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.errors import RequestError
from mlx_k2.text.history_reader import copied_json
from mlx_k2.text.typescript_tools import typescript_tools
from tests.text.fixtures import as_text, ids_of, pieces_of, tokenizer
from tests.text.kimi import MODELS, golden_prompts, kimi_tokenizer, needs_vocabulary, template

PROMPTS = {prompt["id"]: prompt for model in MODELS for prompt in golden_prompts(model)}
TEXT_PROMPTS = {name: prompt for name, prompt in PROMPTS.items() if prompt["group"] != "vision"}
IMAGE_PROMPTS = {name: prompt for name, prompt in PROMPTS.items() if prompt["group"] == "vision"}


@pytest.mark.parametrize("prompt", TEXT_PROMPTS.values(), ids=TEXT_PROMPTS.keys())
def test_a_prompt_has_the_text_of_the_checkpoints_tokenizer(prompt: dict[str, Any]) -> None:
    pieces = pieces_of(
        template(prompt["template"]), tokenizer(), prompt["messages"], prompt["tools"], **prompt["flags"]
    )
    assert as_text(pieces) == prompt["expected"]


@needs_vocabulary
@pytest.mark.parametrize("model", MODELS)
def test_prompts_have_the_ids_of_the_checkpoints_tokenizer(model: str) -> None:
    prompts = [prompt for prompt in TEXT_PROMPTS.values() if prompt["template"] == model and "ids_sha256" in prompt]
    assert len(prompts) > 20  # prompts without ids have a message that spells a control token
    for prompt in prompts:
        ids = ids_of(template(model), kimi_tokenizer(), prompt["messages"], prompt["tools"], **prompt["flags"])
        assert hashlib.sha256(json.dumps(ids).encode()).hexdigest() == prompt["ids_sha256"], prompt["id"]


@needs_vocabulary
def test_the_prompts_for_hello_have_the_published_ids() -> None:
    hello = [{"role": "user", "content": "hello"}]
    ids = [163587, 2482, 163601, 22931, 163586, 163588, 69702, 163601]
    assert ids_of(template("kimi-k2-thinking"), kimi_tokenizer(), hello)[-8:] == ids
    for model in ("kimi-k2.5", "kimi-k2.6", "kimi-k2.7-code"):
        assert ids_of(template(model), kimi_tokenizer(), hello) == [*ids, 163606]
    for model in ("kimi-k2.5", "kimi-k2.6"):
        assert ids_of(template(model), kimi_tokenizer(), hello, thinking=False) == [*ids, 163606, 163607]


@pytest.mark.parametrize("prompt", IMAGE_PROMPTS.values(), ids=IMAGE_PROMPTS.keys())
def test_a_prompt_with_an_image_is_refused(prompt: dict[str, Any]) -> None:
    with pytest.raises(
        RequestError, match=r"^message \d \(\w+\) has an image, and mlx-k2 runs a model's text part only"
    ):
        ids_of(template(prompt["template"]), tokenizer(), prompt["messages"])


@pytest.mark.parametrize(
    ("model", "variables"),
    [
        ("kimi-k2-instruct", set()),
        ("kimi-k2-thinking", set()),
        ("kimi-k2.5", {"thinking", "tools_ts_str"}),
        ("kimi-k2.6", {"thinking", "tools_ts_str", "preserve_thinking"}),
        ("kimi-k2.7-code", {"tools_ts_str"}),
    ],
)
def test_the_variables_of_a_models_template_are_known(model: str, variables: set[str]) -> None:
    assert template(model).variables == {"messages", "tools", "add_generation_prompt"} | variables
    assert template(model).warnings == ()
    assert template(model).has_reasoning == (model != "kimi-k2-instruct")


hostile_texts = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<think>", "</think>", "\n", "// ", '"', "é", "x"]), max_size=3
).map("".join)
properties = st.dictionaries(
    hostile_texts, st.fixed_dictionaries({"type": hostile_texts, "description": hostile_texts}), max_size=2
)
functions = st.fixed_dictionaries(
    {"name": hostile_texts},
    optional={
        "description": hostile_texts,
        "parameters": st.fixed_dictionaries({"type": st.just("object"), "properties": properties}),
    },
)


@given(st.lists(functions, min_size=1, max_size=2))
def test_a_typescript_declaration_is_part_of_the_prompt_and_none_of_its_text_is_a_control_token(
    declared_functions: list[dict[str, Any]],
) -> None:
    tools = [{"type": "function", "function": function} for function in declared_functions]
    pieces = pieces_of(template("kimi-k2.5"), tokenizer(), [{"role": "user", "content": "hello"}], tools)
    names = ["<|im_system|>", "<|im_middle|>", "<|im_end|>", "<|im_user|>", "<|im_middle|>", "<|im_end|>"]
    names += ["<|im_assistant|>", "<|im_middle|>", "<think>"]
    control_ids = [piece for piece in pieces if isinstance(piece, int)]
    assert control_ids == [tokenizer().token_id(name) for name in names]
    declaration = str(pieces[3])  # after <|im_system|>, its name and <|im_middle|>
    # `typescript_tools` expects sorted keys, as the tools of a prompt have them.
    assert declaration == typescript_tools(copied_json(tools, "tools", sort=True))
    for function in declared_functions:
        assert all(f"  {name}?: " in declaration for name in function.get("parameters", {}).get("properties", {}))
