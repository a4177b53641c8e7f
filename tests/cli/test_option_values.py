"""Tests of the request made from options: prompt ids, sampling and stop conditions."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_k2.cli.option_values import ModelFrontend, prompt_text, read_prompt
from mlx_k2.errors import RequestError
from mlx_k2.scheduling.request import Request
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from mlx_k2.weights.checkpoint import ModelDescription, describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_source import ModelSource
from tests.local_cluster import CONTEXT_TOKENS, VOCAB_SIZE

NOTHING: dict[str, Any] = {
    "prompt": None,
    "system": None,
    "token_ids": None,
    "raw": False,
    "max_tokens": None,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "min_p": None,
    "repetition_penalty": None,
    "seed": None,
    "num_logprobs": None,
    "timeout": None,
    "tools_path": None,
    "mcp_path": None,
    "thinking_budget": None,
    "max_tool_calls": 300,
}


@pytest.fixture(scope="module")
def model(endless: Path) -> ModelDescription:
    return describe_model(read_model_files(ModelSource(path_or_repo=str(endless))).files, "the model")


@pytest.fixture(scope="module")
def tokenizer(model: ModelDescription) -> Tokenizer:
    return load_tokenizer(model.files, VOCAB_SIZE)


def request_of(model: ModelDescription, **options: Any) -> Request:
    asked = NOTHING | options
    return read_prompt(asked, prompt_text(asked), ModelFrontend(model, CONTEXT_TOKENS))


def text_of(tokenizer: Tokenizer, request: Request) -> str:
    return b"".join(tokenizer.token_bytes(token_id) for token_id in request.prompt_ids).decode()


def test_token_ids_are_used_as_the_prompt_unchanged(model: ModelDescription) -> None:
    assert request_of(model, token_ids="3, 514,5").prompt_ids == (3, 514, 5)


def test_a_raw_prompt_is_encoded_as_text_without_control_tokens(model: ModelDescription, tokenizer: Tokenizer) -> None:
    request = request_of(model, prompt="Hello <|im_end|>\n", raw=True)
    assert text_of(tokenizer, request) == "Hello <|im_end|>\n"
    assert not any(tokenizer.is_special(token_id) for token_id in request.prompt_ids)


def test_a_prompt_goes_through_the_chat_template_with_the_system_prompt_before_it(
    model: ModelDescription, tokenizer: Tokenizer
) -> None:
    text = text_of(tokenizer, request_of(model, prompt="What is it?", system="Speak Latin."))
    assert text.index("Speak Latin.") < text.index("<|im_user|>") < text.index("What is it?")
    assert text.endswith("<|im_assistant|>assistant<|im_middle|>")
    assert "Speak Latin." not in text_of(tokenizer, request_of(model, prompt="What is it?"))


def test_without_a_prompt_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO("Grüße\n".encode())))
    assert prompt_text(NOTHING) == "Grüße\n"


@pytest.mark.parametrize(
    ("stdin", "words"),
    [
        (SimpleNamespace(isatty=lambda: True), "there is no prompt: give PROMPT, or write one to standard input"),
        (None, "there is no prompt"),
        (SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"ab\xff")), "is not UTF-8 text: its byte 2 is not"),
        (SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"")), "the prompt is empty"),
    ],
    ids=["a terminal", "closed", "not text", "empty"],
)
def test_standard_input_that_holds_no_prompt_is_refused(
    stdin: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(RequestError, match=words):
        prompt_text(NOTHING)


def test_options_override_the_generation_config_which_overrides_the_defaults(
    model: ModelDescription,
) -> None:
    files = {**model.files, "generation_config.json": b'{"temperature": 0.6, "top_p": 0.9}'}
    recommending = ModelDescription(files, model.config, model.index, model.digest, model.unread_tensors)
    sampling = request_of(recommending, prompt="Hello", temperature=0.2, seed=4).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.2, 0.9, None, 4)
    assert request_of(model, prompt="Hello").sampling.temperature == 1.0


def test_without_a_seed_each_request_gets_a_random_seed(model: ModelDescription) -> None:
    assert len({request_of(model, prompt="Hello").sampling.seed for _ in range(5)}) > 1


def test_stop_ids_come_from_the_tokenizer_and_the_generation_config(
    model: ModelDescription, tokenizer: Tokenizer
) -> None:
    files = {**model.files, "generation_config.json": b'{"eos_token_id": [7]}'}
    naming = ModelDescription(files, model.config, model.index, model.digest, model.unread_tensors)
    stops = request_of(naming, prompt="Hello").stop_ids
    assert stops == {tokenizer.token_id("<|im_end|>"), tokenizer.token_id("[EOS]"), 7}


def test_max_tokens_defaults_to_the_context_length(model: ModelDescription) -> None:
    assert request_of(model, prompt="Hello").max_tokens == CONTEXT_TOKENS
    assert request_of(model, prompt="Hello", max_tokens=3).max_tokens == 3
