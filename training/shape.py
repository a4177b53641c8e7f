"""The sizes of the model. Knows no arrays."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of the model, named as in config.json."""

    vocab_size: int
    hidden_size: int = 192
    num_hidden_layers: int = 7
    num_attention_heads: int = 6
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 32
    intermediate_size: int = 384
    moe_intermediate_size: int = 96
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    routed_scaling_factor: float = 2.827
    rms_norm_eps: float = 1e-5
    rope_theta: float = 50000.0
    rope_factor: float = 64.0
    rope_original_positions: int = 256
    rope_beta_fast: float = 1.0
    rope_beta_slow: float = 1.0

    def as_dict(self) -> dict[str, int | float]:
        """Return the sizes by name, to store them with weights."""
        return asdict(self)
