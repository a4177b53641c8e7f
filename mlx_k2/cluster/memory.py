"""How much memory a stage may take on its host, and how much it takes beside its weights. Pure arithmetic, in bytes."""

from mlx_k2.config import ModelConfig

GB = 10**9

ATTENTION_BYTES = 512 * 2**20
"""Allowance for what attention holds at once: its blocks of scores, and the keys and values rebuilt for them."""

_FRACTION_WITHOUT_GPU = 0.8  # of the RAM, where no GPU driver says how much may be held


def memory_bound_bytes(memory_gb: float | None, working_set_bytes: int | None, ram_bytes: int | None) -> int | None:
    """What one host's stage may take; None where nothing is known of the host.

    ``memory_gb`` is the hostfile's, ``working_set_bytes`` what the GPU's driver lets be held (None without a GPU), and
    ``ram_bytes`` all of the memory. The driver's word stands above the hostfile's.
    """
    if working_set_bytes is None and ram_bytes is not None:
        working_set_bytes = int(ram_bytes * _FRACTION_WITHOUT_GPU)
    bounds = [] if working_set_bytes is None else [working_set_bytes]
    if memory_gb is not None:
        bounds.append(int(memory_gb * GB))
    return min(bounds, default=None)


def layer_cache_bytes(config: ModelConfig, num_slots: int, context_tokens: int, compute_bytes: int) -> int:
    """One layer's latent cache when every slot is full: one row of ``latent_dim`` values for each token."""
    return num_slots * context_tokens * config.latent_dim * compute_bytes


def working_bytes(config: ModelConfig, chunk_tokens: int, compute_bytes: int, largest_piece_bytes: int) -> int:
    """What a stage takes beside its weights and cache: the larger of loading one piece and computing one chunk."""
    return max(largest_piece_bytes, ATTENTION_BYTES + chunk_tokens * _values_per_token(config) * compute_bytes)


def _values_per_token(config: ModelConfig) -> int:
    """Values that one token of a chunk has in flight at the widest places of a layer, taken together."""
    residual = 4 * config.hidden_size  # the stream, its norm, the branch's output and the shared expert's
    heads = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    routed = config.num_experts_per_tok * (config.hidden_size + 3 * config.moe_intermediate_size)
    dense = 3 * config.intermediate_size
    return residual + max(heads, routed, dense)
