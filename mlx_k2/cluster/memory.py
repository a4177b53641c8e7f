"""The memory that stages may use on a host, and that a stage needs besides its weights. Pure arithmetic, in bytes."""

from mlx_k2.config import ModelConfig

GB = 10**9

ATTENTION_BYTES = 512 * 2**20
"""Allowance for what attention holds at once: blocks of scores, and the keys and values rebuilt for them."""

_FRACTION_WITHOUT_GPU = 0.8  # of the RAM, if no GPU driver sets a limit


def memory_bound_bytes(
    memory_gb: float | None, working_set_bytes: int | None, ram_bytes: int | None, other_bytes: int = 0
) -> int | None:
    """Return the bytes that all stages on one host may use together; None if nothing is known of the host.

    ``memory_gb`` is the hostfile's limit, ``working_set_bytes`` the GPU driver's (None without a GPU), and
    ``ram_bytes`` the size of the RAM. The hostfile can lower the driver's limit but not raise it. Stages of other
    commands on the host hold ``other_bytes``.
    """
    if working_set_bytes is None and ram_bytes is not None:
        working_set_bytes = int(ram_bytes * _FRACTION_WITHOUT_GPU)
    bounds = [] if working_set_bytes is None else [max(0, working_set_bytes - other_bytes)]
    if memory_gb is not None:
        bounds.append(int(memory_gb * GB))
    return min(bounds, default=None)


def layer_cache_bytes(config: ModelConfig, num_slots: int, context_tokens: int, compute_bytes: int) -> int:
    """Return the bytes of one layer's latent cache with every slot full: a row of ``latent_dim`` values per token."""
    return num_slots * context_tokens * config.latent_dim * compute_bytes


def working_bytes(config: ModelConfig, chunk_tokens: int, compute_bytes: int, largest_part_bytes: int) -> int:
    """Return the bytes that a stage needs besides its weights and cache.

    This is the larger of what reading the largest part (a layer or the head) and computing one chunk need.
    """
    return max(largest_part_bytes, ATTENTION_BYTES + chunk_tokens * _values_per_token(config) * compute_bytes)


def _values_per_token(config: ModelConfig) -> int:
    """Return the number of values that a layer holds for one token of a chunk at the layer's widest operations."""
    residual = 4 * config.hidden_size  # residual stream, its norm, the branch's output, the shared expert's
    heads = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    routed = config.num_experts_per_tok * (config.hidden_size + 3 * config.moe_intermediate_size)
    dense = 3 * config.intermediate_size
    return residual + max(heads, routed, dense)
