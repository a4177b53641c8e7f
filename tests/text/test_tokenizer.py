"""Tests of the tokenizer: text to token ids and back, its files and their defects, and texts of any length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.errors import TokenizerError
from mlx_k2.text.tokenizer import bounded_parts, load_tokenizer, slices
from tests.text.fixtures import FILES, SINGLE_BYTES, VOCAB_SIZE, decode, tiktoken_files, tokenizer

NAMES = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<think>", "</think>", "<|reserved_token_799|>"]
texts = st.lists(st.one_of(st.text(), st.sampled_from(NAMES))).map("".join)


@given(texts)
def test_encoded_text_decodes_to_itself_and_has_no_control_token(text: str) -> None:
    ids = tokenizer().encode_text(text)
    assert decode(ids) == text
    assert not any(map(tokenizer().is_special, ids))


@given(st.text(alphabet=st.characters(codec=None, categories=["Cs", "L"])))
def test_lone_surrogates_become_replacement_characters(text: str) -> None:
    expected = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert decode(tokenizer().encode_text(text)) == expected


def test_a_word_in_the_vocabulary_is_encoded_as_one_token() -> None:
    (word,) = tokenizer().encode_text(" water")
    assert tokenizer().token_bytes(word) == b" water"


def test_a_base_token_spelled_like_a_control_token_is_an_ordinary_token() -> None:
    files = tiktoken_files([*SINGLE_BYTES, b"<|im_end|>", b"<|"], {258: "<|im_end|>"})
    small_tokenizer = load_tokenizer(files, 300)
    assert small_tokenizer.token_id("<|im_end|>") == 258
    assert not small_tokenizer.is_special(256)
    assert 258 not in small_tokenizer.encode_text("<|im_end|>")


def test_ids_without_a_name_are_reserved_control_tokens() -> None:
    small_tokenizer = load_tokenizer(tiktoken_files(SINGLE_BYTES, {256: "[BOS]"}), 260)
    assert small_tokenizer.token_bytes(259) == b"<|reserved_token_259|>"
    assert small_tokenizer.token_id("<|reserved_token_259|>") == 259
    assert small_tokenizer.is_special(259)
    assert small_tokenizer.vocab_size == 260


def test_the_stop_ids_are_im_end_and_eos() -> None:
    assert tokenizer().stop_ids == {tokenizer().token_id("<|im_end|>"), tokenizer().token_id("[EOS]")}
    assert load_tokenizer(tiktoken_files(SINGLE_BYTES, {256: "[EOS]"}), 260).stop_ids == {256}
    assert load_tokenizer(tiktoken_files(SINGLE_BYTES), 260).stop_ids == frozenset()


def test_an_unknown_control_token_is_named() -> None:
    with pytest.raises(TokenizerError, match=r"no special token '<\|im_sideways\|>'"):
        tokenizer().token_id("<|im_sideways|>")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"AAAA\n", "line 257: not a base64 token and its rank"),
        (b"AAAA 256 9\n", "line 257: not a base64 token and its rank"),
        (b"AAAA -1\n", "line 257: not a base64 token and its rank"),
        (b"A?A= 256\n", "line 257: b'A[?]A=' is not base64"),
        (b"AAA 256\n", "line 257: b'AAA' is not base64"),
        (b"AAAA 255\n", "line 257: rank 255 occurs twice"),
        (b"AA== 256\n", "line 257: token b'.x00' occurs twice"),
        (b"AAAA 300\n", "line 257: rank 300 is outside the vocabulary of 300 tokens"),
        (b"AAAA 258\n", "rank 256 is missing"),
    ],
)
def test_a_bad_line_of_tiktoken_model_is_named(line: bytes, error: str) -> None:
    files = tiktoken_files(SINGLE_BYTES)
    files["tiktoken.model"] += line
    with pytest.raises(TokenizerError, match=f"tiktoken.model:? {error}"):
        load_tokenizer(files, 300)


def test_a_vocabulary_without_some_byte_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no token for the single byte 0xff"):
        load_tokenizer(tiktoken_files(SINGLE_BYTES[:255]), 300)


@pytest.mark.parametrize(
    ("control_tokens", "error"),
    [
        ({300: "[EOS]"}, "'\\[EOS\\]' has id 300, outside the 300 tokens"),
        ({-1: "[EOS]"}, "outside the 300 tokens"),
        ({65: "[EOS]"}, "has id 65, which an ordinary token has"),
        ({256: "[EOS]", 257: "[EOS]"}, "has two ids, 256 and 257"),
        ({256: ""}, "256 has an empty name"),
    ],
)
def test_a_bad_control_token_is_named(control_tokens: dict[int, str], error: str) -> None:
    with pytest.raises(TokenizerError, match=error):
        load_tokenizer(tiktoken_files(SINGLE_BYTES, control_tokens), 300)


@pytest.mark.parametrize("config", [b"", b"[]", b'{"added_tokens_decoder": 3}', b'{"added_tokens_decoder": {"x": {}}}'])
def test_a_bad_tokenizer_config_is_named(config: bytes) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json"):
        load_tokenizer(FILES | {"tokenizer_config.json": config}, VOCAB_SIZE)


def test_missing_files_are_named() -> None:
    with pytest.raises(TokenizerError, match=r"the model has no tiktoken.model: fetch"):
        load_tokenizer({"tokenizer.json": b"{}"}, 300)
    with pytest.raises(TokenizerError, match=r"the model has no tokenizer_config.json: fetch"):
        load_tokenizer({"tiktoken.model": b""}, 300)


# ---- splitting of text before it is encoded


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "I'm sure it's fine, but I can't say I'd trust that it's what we'd ship.",
            "I'm| sure| it's| fine|,| but| I| can't| say| I'd| trust| that| it's| what| we'd| ship|.",
        ),
        ("1234567890", "123|456|789|0"),
        ("hello", "hello"),
        ("你好world汉字 abc", "你好|world|汉字| abc"),
        ("CamelCase HTTPServer", "Camel|Case| HTTPServer"),
        ("a  b\n\n  c \n", "a| | b|\n\n| | c| \n"),
        ("x = {'a': 1}!\n", "x| =| {'|a|':| |1|}!\n"),
        ("naïve WE'LL e\u0301t\u0301e\u0301", "naïve| WE'LL| e\u0301t\u0301e\u0301"),
        ("３½ １２３４", "３½| |１２３|４"),
    ],
)
def test_text_is_split_into_words_like_kimi_k2s_tokenizer(text: str, words: str) -> None:
    """The vocabulary has the expected words as tokens. The text is encoded to them only if it is split into them."""
    expected = [word.encode() for word in words.split("|")]
    long_words = [word for word in dict.fromkeys(expected) if len(word) > 1]
    small_tokenizer = load_tokenizer(tiktoken_files([*SINGLE_BYTES, *long_words]), 300)
    assert [small_tokenizer.token_bytes(token_id) for token_id in small_tokenizer.encode_text(text)] == expected


characters_and_counts = st.tuples(
    st.sampled_from([" ", "x", "\n", "汉", "\u3000"]), st.sampled_from([1, 2, 24_999, 25_000, 25_001, 60_000])
)


@given(st.lists(characters_and_counts, max_size=12))
def test_long_text_is_split_into_bounded_parts_that_join_to_the_same_text(runs: list[tuple[str, int]]) -> None:
    text = "".join(character * count for character, count in runs)
    parts = list(bounded_parts(text))
    assert "".join(parts) == text
    assert all(len(part) <= 400_000 for part in parts)
    for part in parts:
        spaces = "".join(" " if character.isspace() else "x" for character in part)
        assert " " * 25_001 not in spaces
        assert "x" * 25_001 not in spaces


def test_text_is_split_only_within_runs_of_25_000_characters_and_after_400_000_characters() -> None:
    assert list(bounded_parts("word " * 20_000)) == ["word " * 20_000]
    assert [len(part) for part in bounded_parts("a" * 60_001)] == [25_000, 25_000, 10_001]
    assert [len(part) for part in bounded_parts("a b " * 100_001)] == [400_000, 4]


characters = st.sampled_from("ab Z'sé汉1.,!\r\n\t\u00a0\u3000\x1c\x85\u2028\u0301") | st.characters(codec="utf-8")


@given(st.text(characters, max_size=60), st.integers(1, 5))
def test_a_text_has_the_same_ids_in_slices_as_in_whole(text: str, min_length: int) -> None:
    parts = list(slices(text, min_length))
    assert "".join(parts) == text
    assert [token_id for part in parts for token_id in tokenizer().encode_text(part)] == tokenizer().encode_text(text)


def test_prose_and_code_are_cut_into_slices_of_about_the_minimum_length() -> None:
    for text in ("some plain words " * 10_000, "x = [1, 2]\n" * 10_000):
        assert all(16_384 <= len(part) < 16_500 for part in list(slices(text))[:-1])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "\n " * 500_000, "!" * 1_000_000, "é" * 500_000])
def test_a_million_equal_characters_are_encoded_within_the_test_timeout(text: str) -> None:
    assert decode(tokenizer().encode_text(text)) == text
