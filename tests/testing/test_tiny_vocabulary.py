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
SIZES = [MIN_VOCAB_SIZE, MIN_VOCAB_SIZE + 1, 640, 4096, 163_840]


@pytest.mark.parametrize("vocab_size", SIZES)
def test_control_tokens_follow_the_ordinary_tokens_like_in_kimi_k2(vocab_size: int) -> None:
    files = tiny_vocabulary(vocab_size, 4096).files
    loaded = load_tokenizer(files, vocab_size)
    num_ordinary = len(files["tiktoken.model"].splitlines())
    assert num_ordinary + 256 <= vocab_size
    assert {loaded.token_id(name) - num_ordinary: name for name in K2_IDS.values()} == {
        number - 163_584: name for number, name in K2_IDS.items()
    }


@pytest.mark.parametrize("vocab_size", SIZES)
def test_words_fill_the_ids_between_bytes_and_control_tokens(vocab_size: int) -> None:
    files = tiny_vocabulary(vocab_size, 4096).files
    tokens = [base64.b64decode(line.split()[0]) for line in files["tiktoken.model"].splitlines()]
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert len(set(tokens)) == len(tokens)
    assert vocab_size > 640 or len(tokens) == vocab_size - 256


def test_the_ids_for_config_json_equal_the_tokenizers() -> None:
    tiny = tiny_vocabulary(800, 1234)
    loaded = load_tokenizer(tiny.files, 800)
    assert tiny.bos_token_id == loaded.token_id("[BOS]")
    assert tiny.eos_token_id == loaded.token_id("<|im_end|>")
    assert tiny.pad_token_id == loaded.token_id("[PAD]")
    assert json.loads(tiny.files["generation_config.json"]) == {"max_length": 1234, "eos_token_id": tiny.eos_token_id}


def test_the_tiny_vocabularys_chat_template_file_can_be_loaded() -> None:
    files = tiny_vocabulary(800, 4096).files
    assert load_chat_template(files).source.encode() == files["chat_template.jinja"]
