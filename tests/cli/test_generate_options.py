"""Tests of the options of generate, and of the request that they give: prompt ids, sampling and stop conditions."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from mlx_k2.cli.generate import command, first_submissions
from mlx_k2.cli.generate_file import line_submissions
from mlx_k2.cli.generate_options import GenerateOptions
from mlx_k2.cli.option_values import with_struct
from mlx_k2.cli.prompt_files import read_prompt_lines
from mlx_k2.errors import RequestError
from mlx_k2.scheduling.request import Request
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from mlx_k2.weights.checkpoint import ModelDescription, describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_frontend import ModelFrontend
from mlx_k2.weights.model_source import ModelSource
from tests.advice import follows_advice
from tests.local_cluster import CONTEXT_TOKENS, VOCAB_SIZE
from tests.text.kimi import template_source


def options_of(*arguments: str) -> GenerateOptions:
    """Return the options of a command line."""
    return options_in(command.make_context("generate", list(arguments)))


def options_in(context: click.Context) -> GenerateOptions:
    """Return the options in a context of the command."""
    received: list[GenerateOptions] = []
    with_struct(GenerateOptions)(received.append)(**context.params)
    return received[0]


@pytest.fixture(scope="module")
def model(endless_model: Path) -> ModelDescription:
    return describe_model(read_model_files(ModelSource(path_or_repo=str(endless_model))).files, "the model")


@pytest.fixture(scope="module")
def tokenizer(model: ModelDescription) -> Tokenizer:
    return load_tokenizer(model.files, VOCAB_SIZE)


def with_file(model: ModelDescription, name: str, data: bytes) -> ModelDescription:
    """Return the model with another file, such as a chat template."""
    return replace(model, files={**model.files, name: data})


def with_template(model: ModelDescription, name: str) -> ModelDescription:
    """Return the model with the chat template of the Kimi model ``name``."""
    return with_file(model, "chat_template.jinja", template_source(name).encode())


def request_of(model: ModelDescription, *arguments: str) -> Request:
    """Return the request that a command line gives."""
    options = options_of(*arguments)
    return first_submissions(options, options.read_prompt(), ModelFrontend(model, CONTEXT_TOKENS))[0].request


def text_of(tokenizer: Tokenizer, request: Request) -> str:
    return b"".join(tokenizer.token_bytes(token_id) for token_id in request.prompt_ids).decode()


def test_token_ids_are_used_as_the_prompt_unchanged(model: ModelDescription) -> None:
    assert request_of(model, "--token-ids", "3, 514,5").prompt_ids == (3, 514, 5)


def test_a_raw_prompt_is_encoded_as_text_without_control_tokens(model: ModelDescription, tokenizer: Tokenizer) -> None:
    request = request_of(model, "--raw", "Hello <|im_end|>\n")
    assert text_of(tokenizer, request) == "Hello <|im_end|>\n"
    assert not any(tokenizer.is_special(token_id) for token_id in request.prompt_ids)


def test_a_prompt_goes_through_the_chat_template_with_the_system_prompt_before_it(
    model: ModelDescription, tokenizer: Tokenizer
) -> None:
    text = text_of(tokenizer, request_of(model, "--system", "Speak Latin.", "What is it?"))
    assert text.index("Speak Latin.") < text.index("<|im_user|>") < text.index("What is it?")
    assert text.endswith("<|im_assistant|>assistant<|im_middle|>")
    assert "Speak Latin." not in text_of(tokenizer, request_of(model, "What is it?"))


@follows_advice(
    "there is no prompt: give PROMPT, or write one to standard input",
)
@pytest.mark.parametrize("arguments", [[], ["-"], ["-p", "-"]])
def test_without_a_prompt_standard_input_is_read(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO("Grüße\n".encode())))
    assert options_of(*arguments).read_prompt() == "Grüße\n"


@pytest.mark.parametrize("arguments", [["Summarise"], ["--prompt", "Summarise"]])
@pytest.mark.parametrize(
    ("content", "prompt"), [("Grüße\n\n", "Grüße\n\nSummarise"), (" \n", "Summarise"), ("", "Summarise")]
)
def test_text_of_a_file_on_standard_input_comes_before_the_prompt(
    arguments: list[str], content: str, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text(content)
    with (tmp_path / "text").open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert options_of(*arguments).read_prompt() == prompt
    with os.fdopen(os.open(os.devnull, os.O_RDONLY)) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert options_of(*arguments).read_prompt() == "Summarise"


@follows_advice(
    "reading standard input to its end; add < /dev/null if it has no text",
)
def test_generate_waits_for_a_silent_pipe_with_a_hint_and_not_for_dev_null(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    read_end, write_end = os.pipe()

    def log_and_end_the_pipe(line: str) -> None:
        logged.append(line)
        os.close(write_end)

    monkeypatch.setattr("mlx_k2.cli.generate_options.log", log_and_end_the_pipe)
    monkeypatch.setattr("mlx_k2.cli.generate_options._SILENT_WAIT_S", 0.1)
    with os.fdopen(read_end) as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        assert options_of("Hi").read_prompt() == "Hi"
    with Path(os.devnull).open() as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert options_of("Hi").read_prompt() == "Hi"
    assert logged == ["reading standard input to its end; add < /dev/null if it has no text"]


def test_a_prompt_as_an_argument_and_as_an_option_is_refused() -> None:
    with pytest.raises(click.UsageError, match="PROMPT and --prompt are the same"):
        options_of("Hello", "--prompt", "Hello")


def test_options_have_also_the_short_names_of_other_programs() -> None:
    short = options_of("-p", "Hello", "-n", "3", "--temp", "0.5", "--system-prompt", "Be brief.", "-m", "a/b")
    long = options_of("Hello", "--max-tokens", "3", "--temperature", "0.5", "--system", "Be brief.", "--model", "a/b")
    assert short.read_prompt() == long.read_prompt()
    assert (short.conversation, short.cluster) == (long.conversation, long.cluster)


def test_values_with_which_other_programs_turn_a_filter_or_a_seed_off_are_accepted(model: ModelDescription) -> None:
    model = with_file(model, "generation_config.json", b'{"top_k": 20, "top_p": 0.9}')
    assert request_of(model, "Hello").sampling.top_k == 20
    assert request_of(model, "--top-k", "0", "Hello").sampling.top_k is None
    greedy = request_of(model, "--top-p", "0", "--temperature", "2", "Hello").sampling
    assert (greedy.temperature, greedy.top_p) == (0.0, 1.0)
    assert len({request_of(model, "--seed", "-1", "Hello").sampling.seed for _ in range(5)}) > 1


@pytest.mark.parametrize(
    ("stdin", "error"),
    [
        (SimpleNamespace(isatty=lambda: True), "there is no prompt: give PROMPT, or write one to standard input"),
        (None, "there is no prompt"),
        (SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"ab\xff")), "is not UTF-8 text: its byte 2 is not"),
        (SimpleNamespace(isatty=lambda: False, buffer=io.BytesIO(b"")), "the prompt is empty"),
    ],
    ids=["a terminal", "closed", "not text", "empty"],
)
def test_standard_input_without_a_prompt_is_refused(stdin: object, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    with pytest.raises(RequestError, match=error):
        options_of().read_prompt()


def test_options_override_the_generation_config_which_overrides_the_defaults(model: ModelDescription) -> None:
    with_config = with_file(model, "generation_config.json", b'{"temperature": 0.6, "top_p": 0.9}')
    sampling = request_of(with_config, "--temperature", "0.2", "--seed", "4", "Hello").sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (0.2, 0.9, None, 4)
    assert request_of(model, "Hello").sampling.temperature == 1.0


def test_an_empty_system_prompt_replaces_the_models_own(model: ModelDescription, tokenizer: Tokenizer) -> None:
    request = request_of(model, "--system", "", "Hello")
    assert text_of(tokenizer, request).startswith("<|im_system|>system<|im_middle|><|im_end|><|im_user|>")
    conversation = options_of("--system", "").conversation.begin(ModelFrontend(model, CONTEXT_TOKENS), tools=None)
    conversation.add_user("Hello")
    assert tuple(conversation.prompt_ids()) == request.prompt_ids


def test_without_thinking_the_default_temperature_is_0_6(model: ModelDescription, tokenizer: Tokenizer) -> None:
    model = with_template(model, "kimi-k2.5")
    instant = request_of(model, "--thinking", "off", "Hello")
    assert text_of(tokenizer, instant).endswith("<think></think>")
    assert instant.sampling.temperature == 0.6
    assert request_of(model, "--thinking", "off", "--temperature", "0.1", "Hello").sampling.temperature == 0.1
    for arguments in (("--thinking", "on"), ()):
        request = request_of(model, *arguments, "Hello")
        assert text_of(tokenizer, request).endswith("<think>")
        assert request.sampling.temperature == 1.0


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("kimi-k2-thinking", ["--thinking", "off"], "thinking cannot be turned off: this model always thinks"),
        ("kimi-k2.7-code", ["--thinking", "off"], "thinking cannot be turned off: this model always thinks"),
        ("kimi-k2-instruct", ["--thinking", "on"], "thinking cannot be turned on: this model never thinks"),
        ("kimi-k2.5", ["--preserve-thinking"], "does not read the variable preserve_thinking"),
    ],
)
def test_a_mode_that_the_template_does_not_have_is_refused(
    name: str, arguments: list[str], error: str, model: ModelDescription
) -> None:
    with pytest.raises(RequestError, match=error):
        request_of(with_template(model, name), *arguments, "Hello")


@pytest.mark.parametrize("arguments", [["--thinking", "off"], ["--thinking", "on"], ["--preserve-thinking"]])
def test_a_raw_prompt_with_an_option_for_thinking_is_refused(arguments: list[str]) -> None:
    with pytest.raises(RequestError, match="go without --tools, --mcp and options for thinking"):
        options_of("--raw", *arguments, "x")


def test_a_line_of_a_file_of_prompts_overrides_the_options_for_thinking_and_declares_tools(
    model: ModelDescription, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    frontend = ModelFrontend(with_template(model, "kimi-k2.6"), CONTEXT_TOKENS)
    tools = [{"type": "function", "function": {"name": "f"}}]
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "r"},
        {"role": "user", "content": "c"},
    ]
    options = options_of("--thinking", "off", "--preserve-thinking")

    def request(**fields: object) -> Request:
        (tmp_path / "prompts").write_text(json.dumps(fields))
        (line,) = read_prompt_lines(str(tmp_path / "prompts"), options.conversation.sampling).values()
        (submission,), _ = line_submissions(options, line, seed=1, frontend=frontend)
        return submission.request

    assert "type f = (_: {}) => any;" in text_of(tokenizer, request(prompt="x", tools=tools))
    preserved = request(messages=history, thinking=True)
    assert "<think>r</think>b" in text_of(tokenizer, preserved)
    assert text_of(tokenizer, preserved).endswith("<think>")
    assert preserved.sampling.temperature == 1.0
    dropped = request(messages=history, preserve_thinking=False)
    assert "<think></think>b" in text_of(tokenizer, dropped)
    assert dropped.sampling.temperature == 0.6


@pytest.mark.parametrize(
    "arguments",
    [
        ("--regex", "a"),
        ("--tool-choice", "none"),
        ("--parallel-tool-calls", "off"),
        ("--min-tokens", "3"),
        ("--thinking-budget", "3", "--presence-penalty", "1"),
    ],
)
def test_an_option_that_needs_token_masks_is_refused_by_name_with_connect(arguments: tuple[str, ...]) -> None:
    with pytest.raises(RequestError, match=f"--connect has no {arguments[0]}"):
        options_of("x", *arguments).conversation.for_server()


def test_with_connect_other_sampling_options_are_accepted_and_the_grammar_of_tool_calls_is_off() -> None:
    assert not options_of("x", "--presence-penalty", "1").conversation.for_server().sampling.tool_grammar


def test_parallel_tool_calls_off_allows_one_call_at_a_time() -> None:
    options = options_of("x", "--parallel-tool-calls", "off", "--tool-choice", "auto")
    constraint = options.conversation.sampling.constraint()
    assert constraint is not None and constraint.tools is not None and not constraint.tools.is_parallel


def test_without_a_seed_each_request_gets_a_random_seed(model: ModelDescription) -> None:
    assert len({request_of(model, "Hello").sampling.seed for _ in range(5)}) > 1


def test_stop_ids_come_from_tokenizer_and_generation_config(model: ModelDescription, tokenizer: Tokenizer) -> None:
    model = with_file(model, "generation_config.json", b'{"eos_token_id": [7]}')
    assert request_of(model, "Hello").stop_ids == {tokenizer.token_id("<|im_end|>"), tokenizer.token_id("[EOS]"), 7}


def test_max_tokens_defaults_to_the_context_length(model: ModelDescription) -> None:
    assert request_of(model, "Hello").max_tokens == CONTEXT_TOKENS
    assert request_of(model, "--max-tokens", "3", "Hello").max_tokens == 3
