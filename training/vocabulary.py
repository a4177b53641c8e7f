"""The byte-level BPE: training, tiktoken.model file, and K2's special tokens. Knows no model.

A rank is the id of an ordinary token: the number of its merge, after the 256 bytes. Special tokens have the ids after
the ranks.
"""

import base64
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import regex  # type: ignore[import-untyped]
import tiktoken

NUM_RESERVED = 256
PATTERN = "|".join(  # as in K2's tokenizer
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
# Offsets from the number of base ranks, as in K2, where [BOS] is 163584 after 163,584 ranks.
SPECIAL_OFFSETS = {
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
_NOT_SPECIAL = ("<|tool_call", "<think>", "</think>")  # kept when a decoder skips special tokens, as in K2

Pair = tuple[bytes, bytes]


def train_ranks(texts: Iterable[str], num_ranks: int) -> list[bytes]:
    """Train a byte-level BPE; return the bytes of each token, by rank.

    Start with 256 bytes, then merge the most frequent pairs. Never merge digits.
    """
    pattern = regex.compile(PATTERN, regex.V1)
    chunks = Counter(chunk for text in texts for chunk in pattern.findall(text))
    words = [[bytes([byte]) for byte in chunk.encode()] for chunk in chunks if not chunk[0].isnumeric()]
    counts = [count for chunk, count in chunks.items() if not chunk[0].isnumeric()]
    ranks = [bytes([byte]) for byte in range(256)]
    pairs: Counter[Pair] = Counter()
    holders: dict[Pair, set[int]] = {}
    for index, word in enumerate(words):
        _count_pairs(word, index, counts[index], pairs, holders)
    while len(ranks) < num_ranks:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks.append(best[0] + best[1])
        for index in sorted(holders[best]):
            _count_pairs(words[index], index, -counts[index], pairs, holders)
            words[index] = _merged(words[index], best)
            _count_pairs(words[index], index, counts[index], pairs, holders)
    return ranks


def write_tiktoken(path: Path, ranks: list[bytes]) -> None:
    """Write one line per rank: base64 of its bytes, and its number."""
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    path.write_text("".join(lines))


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Return the rank of each token's bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def load_encoding(path: Path) -> tiktoken.Encoding:
    """Return the tokenizer of a tiktoken.model file, with all special and reserved tokens."""
    ranks = read_tiktoken(path)
    return tiktoken.Encoding(path.stem, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special_ids(len(ranks)))


def special_ids(num_ranks: int) -> dict[str, int]:
    """Return the ids of all 256 special tokens by name. Tokens without a name are `<|reserved_token_{id}|>`."""
    names = {offset: name for name, offset in SPECIAL_OFFSETS.items()}
    ids = range(num_ranks, num_ranks + NUM_RESERVED)
    return {names.get(token - num_ranks, f"<|reserved_token_{token}|>"): token for token in ids}


def write_tokenizer_config(path: Path, num_ranks: int, max_tokens: int) -> None:
    """Write tokenizer_config.json, with the named special tokens at K2's offsets."""
    decoder = {
        str(num_ranks + offset): {
            "content": name,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": not name.startswith(_NOT_SPECIAL),
        }
        for name, offset in SPECIAL_OFFSETS.items()
    }
    config = {
        "added_tokens_decoder": decoder,
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "model_max_length": max_tokens,
        "tokenizer_class": "TikTokenTokenizer",
    }
    path.write_text(json.dumps(config, indent=2) + "\n")


def _count_pairs(
    word: list[bytes], index: int, count: int, pairs: Counter[Pair], holders: dict[Pair, set[int]]
) -> None:
    for pair in itertools.pairwise(word):
        pairs[pair] += count
        holders.setdefault(pair, set()).add(index)


def _merged(word: list[bytes], pair: Pair) -> list[bytes]:
    merged: list[bytes] = []
    for token in word:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged
