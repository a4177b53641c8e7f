"""The tokenizer files of a random checkpoint: every byte, some common words, and Kimi K2's control tokens."""

import base64

import msgspec

from mlx_k2.builtin import BUILTIN_FOLDER

_NUM_BYTES = 256
_NUM_RESERVED = 256

# Offsets of Kimi K2's control tokens from the id after the last ordinary token. The reply parser and the chat template
# use these names. Other reserved ids have no name, as in the original.
_CONTROL_TOKEN_OFFSETS = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
    "<|im_middle|>": 17,
    "<think>": 22,
    "</think>": 23,
    "[UNK]": 254,
    "[PAD]": 255,
}

_WORDS = """\
about above after again air all almost along also always an and animals another any are around as asked at away back
be because been before began being below between big both boy boys but by called came can children come could country
day did different do does down each earth end enough even every eyes far father feet few find first following food for
form found four from get give go going good got great had hand has have head help her here high him his home house how
if important in into is it its just keep kind know land large last left let life light like line little live long look
looked made make man many may me men might more most mother much must my name need never new next night no not now
number of off often old on once one only or other our out over own page part parts people picture place put read right
said same saw say school second see set she should show side since small so some something sometimes soon sound still
story study such take tell than that the their them then there these they things think this those thought three
through time times to together too took two under until up us use used very want was water way we well went were what
when where which while who why will with without word words work world would write year years your"""

MIN_VOCAB_SIZE = _NUM_BYTES + _NUM_RESERVED


class TinyVocabulary(msgspec.Struct, frozen=True):
    """Tokenizer files by name, and the ids that the checkpoint's config.json repeats."""

    files: dict[str, bytes]
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


def tiny_vocabulary(vocab_size: int, max_position_embeddings: int) -> TinyVocabulary:
    """Return the tokenizer files for a model of ``vocab_size`` ids, at least 512.

    The ids are 256 single bytes, then as many words as fit, then 256 reserved ids, among them the control tokens. If
    there are still more ids, they are control tokens without names.
    """
    assert vocab_size >= MIN_VOCAB_SIZE, f"{vocab_size} ids are fewer than 256 bytes and 256 reserved tokens"
    words = [f" {word}".encode() for word in dict.fromkeys(_WORDS.split())][: vocab_size - MIN_VOCAB_SIZE]
    tokens = [bytes([byte]) for byte in range(_NUM_BYTES)] + words
    ids = {name: len(tokens) + offset for name, offset in _CONTROL_TOKEN_OFFSETS.items()}
    added_tokens = {str(token_id): {"content": name, "special": True} for name, token_id in ids.items()}
    named_tokens = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    generation_config = {"max_length": max_position_embeddings, "eos_token_id": ids["<|im_end|>"]}
    files = {
        "tiktoken.model": b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens)),
        "tokenizer_config.json": msgspec.json.encode({"added_tokens_decoder": added_tokens} | named_tokens),
        "chat_template.jinja": (BUILTIN_FOLDER / "chat_template.jinja").read_bytes(),
        "generation_config.json": msgspec.json.encode(generation_config),
    }
    return TinyVocabulary(files, ids["[BOS]"], ids["<|im_end|>"], ids["[PAD]"])
