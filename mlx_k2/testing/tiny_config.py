"""The config.json fields of small models for tests: those of K2 Thinking in small sizes, also in K2.5's nested form."""

from collections.abc import Mapping
from typing import Any

from mlx_k2.weights.known_layout import thinking_config_fields


def tiny_config_fields(vocab_size: int, **changes: Any) -> dict[str, Any]:
    """Return Kimi K2 Thinking's fields in small sizes, with ``changes``.

    The model has every part of K2 (low-rank queries, YaRN, dense and expert layers) in 7 layers.
    """
    small: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "bos_token_id": None,
        "eos_token_id": [],
    }
    return thinking_config_fields(**(small | changes))


def as_kimi_k25(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the same text model in K2.5's form: in ``text_config``, beside a vision tower's config."""
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "text_config": dict(fields),
        "vision_config": {"model_type": "kimi_k25_vision"},
        "eos_token_id": fields["eos_token_id"],
    }
