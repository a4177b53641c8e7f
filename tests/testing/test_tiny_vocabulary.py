"""Tests of tiny vocabularies: their tokens have the order of Kimi K2's, and their files can be loaded."""

import base64
import json

import pytest

from mlx_k2.testing.tiny_vocabulary import MIN_VOCAB_SIZE, tiny_vocabulary
from mlx_k2.text.chat_template import load_chat_template
from mlx_k2.text.tokenizer import load_tokenizer

K2_IDS = {
    163584: "[BOS]",
    163585: "[EOS]",
    163586: "<|im_end|>",
    163587: "<|im_user|>",
    163588: "<|im_assistant|>",
    163590: "<|start_header_id|>",
    163591: "<|end_header_id|>",
    163593: "[EOT]",
    163594: "<|im_system|>",
    163595: "<|tool_calls_section_begin|>",
    163596: "<|tool_calls_section_end|>",
    163597: "<|tool_call_begin|>",
    163598: "<|tool_call_argument_begin|>",
    163599: "<|tool_call_end|>",
    163601: "<|im_middle|>",
    163606: "<think>",
    163607: "</think>",
    163839: "[PAD]",
}
K2_NUM_ORDINARY = 163_584
SIZES = [MIN_VOCAB_SIZE, MIN_VOCAB_SIZE + 1, 640, 4096, 163_840]


@pytest.mark.parametrize("vocab_size", SIZES)
def test_control_tokens_follow_the_ordinary_tokens_as_in_kimi_k2(vocab_size: int) -> None:
    files = tiny_vocabulary(vocab_size, 4096).files
    tokenizer = load_tokenizer(files, vocab_size)
    num_ordinary = len(files["tiktoken.model"].splitlines())
    assert num_ordinary + 256 <= vocab_size
    for k2_id, name in K2_IDS.items():
        assert tokenizer.token_id(name) - num_ordinary == k2_id - K2_NUM_ORDINARY


@pytest.mark.parametrize("vocab_size", SIZES)
def test_words_fill_the_ids_between_bytes_and_control_tokens(vocab_size: int) -> None:
    files = tiny_vocabulary(vocab_size, 4096).files
    tokens = [base64.b64decode(line.split()[0]) for line in files["tiktoken.model"].splitlines()]
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert len(set(tokens)) == len(tokens)
    assert vocab_size > 640 or len(tokens) == vocab_size - 256  # larger sizes have more ids than there are words


def test_config_json_gets_the_ids_of_the_tokenizer() -> None:
    vocabulary = tiny_vocabulary(800, 1234)
    tokenizer = load_tokenizer(vocabulary.files, 800)
    assert vocabulary.bos_token_id == tokenizer.token_id("[BOS]")
    assert vocabulary.eos_token_id == tokenizer.token_id("<|im_end|>")
    assert vocabulary.pad_token_id == tokenizer.token_id("[PAD]")
    generation_config = json.loads(vocabulary.files["generation_config.json"])
    assert generation_config == {"max_length": 1234, "eos_token_id": vocabulary.eos_token_id}


def test_the_chat_template_of_a_tiny_vocabulary_can_be_loaded() -> None:
    files = tiny_vocabulary(800, 4096).files
    assert load_chat_template(files).source.encode() == files["chat_template.jinja"]
