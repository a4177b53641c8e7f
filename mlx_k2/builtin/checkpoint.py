"""The built-in model: a random checkpoint of Kimi K2's architecture, written once under the user's cache directory."""

from pathlib import Path

import platformdirs

from mlx_k2.text.tiny_vocabulary import tiny_vocabulary
from mlx_k2.weights.config_fields import tiny_config_fields
from mlx_k2.weights.random_checkpoint import write_random_checkpoint

FORMAT = 1
"""Raised whenever the same version would write other bytes, so that an older folder is not taken for this one."""

_VOCAB_SIZE = 768
_CONTEXT_TOKENS = 32768
_SEED = 20


def builtin_folder() -> Path:
    """The folder of the built-in checkpoint, which is written now if it is not there; the same bytes on every host."""
    folder = platformdirs.user_cache_path("mlx-k2") / f"builtin-{FORMAT}"
    if not folder.exists():
        vocabulary = tiny_vocabulary(_VOCAB_SIZE, _CONTEXT_TOKENS)
        fields = tiny_config_fields(
            _VOCAB_SIZE,
            max_position_embeddings=_CONTEXT_TOKENS,
            bos_token_id=vocabulary.bos_token_id,
            eos_token_id=vocabulary.eos_token_id,
        )
        write_random_checkpoint(folder, fields, _SEED, vocabulary.files)
    return folder
