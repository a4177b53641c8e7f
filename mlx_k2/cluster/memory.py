"""The memory that stages may use on a host, and that a stage needs besides its weights. Pure arithmetic, in bytes."""

from mlx_k2.config import ModelConfig

GB = 10**9

CPU_BLOCK_BYTES = 128 * 2**20  # limit of a block of attention on a CPU. A block of one head may exceed it
LARGEST_BLOCK_BYTES = 4 * 2**30
"""Limit of a block of attention on a GPU: larger blocks do not noticeably reduce the number of dispatches."""
GPU_MIN_HEADS = 8
"""Minimum number of heads per dispatch. One head of 2048 queries gives only 64 threadgroups for an Ultra's 80 cores."""
BLOCKS_AT_A_TIME = 2  # number of blocks of attention that are in memory at a time
_MIN_QUERIES = 256  # minimum number of queries per block, _MIN_BLOCK_QUERIES of model/attention.py
_LAYERS_IN_FLIGHT = 3
"""Layers whose temporaries a GPU holds at a time: about one command buffer of 100 operations, whose end frees them."""

_FRACTION_WITHOUT_GPU = 0.8  # fraction of the RAM that stages may use if no GPU driver sets a limit


def memory_bound_bytes(
    memory_gb: float | None, working_set_bytes: int | None, ram_bytes: int | None, other_bytes: int = 0
) -> int | None:
    """Return the bytes that all stages on one host may use together; None if nothing is known of the host.

    ``memory_gb`` is the hostfile's limit, ``working_set_bytes`` the GPU driver's (None without a GPU), and
    ``ram_bytes`` the size of the RAM. The hostfile can lower the driver's limit but not raise it. Stages of other
    commands on the host hold ``other_bytes``; the hostfile's limit is not reduced by them.
    """
    if working_set_bytes is None and ram_bytes is not None:
        working_set_bytes = int(ram_bytes * _FRACTION_WITHOUT_GPU)
    bounds = [] if working_set_bytes is None else [max(0, working_set_bytes - other_bytes)]
    if memory_gb is not None:
        bounds.append(int(memory_gb * GB))
    return min(bounds, default=None)


def layer_cache_bytes(config: ModelConfig, num_slots: int, context_tokens: int, compute_bytes: int) -> int:
    """Return the bytes of one layer's latent cache with every slot full: ``cache_row_dim`` values per token."""
    return num_slots * context_tokens * config.cache_row_dim * compute_bytes


def attention_block_bytes(config: ModelConfig, context_tokens: int, compute_bytes: int, *, on_gpu: bool) -> int:
    """Return the limit of a block of attention on a host without spare memory.

    On a GPU the limit is what GPU_MIN_HEADS heads and _MIN_QUERIES queries need at the end of the context, but at least
    the limit on a CPU.
    """
    if not on_gpu:
        return CPU_BLOCK_BYTES
    scores_per_key = _MIN_QUERIES * 2  # of one head: an operation's input and its output
    values_per_key = 3 * config.qk_head_dim  # of one head: rebuilt keys, in two parts, and values
    num_heads = min(GPU_MIN_HEADS, config.num_attention_heads)
    needed_bytes = num_heads * context_tokens * (scores_per_key + values_per_key) * compute_bytes
    return max(CPU_BLOCK_BYTES, needed_bytes)


def added_block_bytes(block_bytes: int, spare_bytes: int) -> int:
    """Return the bytes by which a block grows on a host with spare memory. Half of that memory stays free."""
    return max(0, min(LARGEST_BLOCK_BYTES - block_bytes, spare_bytes // 2 // BLOCKS_AT_A_TIME))


def working_bytes(
    config: ModelConfig,
    chunk_tokens: int,
    compute_bytes: int,
    largest_part_bytes: int,
    *,
    block_bytes: int,
    on_gpu: bool,
) -> int:
    """Return the bytes that a stage needs besides its weights and cache.

    They are enough for reading the largest part (for instance a layer or the head), which has ``largest_part_bytes``,
    and, later, for computing one chunk.
    """
    layer_bytes = chunk_tokens * _values_per_token(config) * compute_bytes
    if on_gpu:
        return max(largest_part_bytes, BLOCKS_AT_A_TIME * block_bytes + _LAYERS_IN_FLIGHT * layer_bytes)
    # a block of one head may exceed its limit on a CPU, so twice the limit is reserved
    return max(largest_part_bytes, 2 * BLOCKS_AT_A_TIME * block_bytes + layer_bytes)


def _values_per_token(config: ModelConfig) -> int:
    """Return the number of values that a layer holds for one token of a chunk at the layer's widest operations."""
    residual = 4 * config.hidden_size  # residual stream, its norm, the branch's output, the shared expert's
    heads = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    outputs = 3 * config.hidden_size  # of an expert, one of them in float32
    routed = config.num_experts_per_tok * (outputs + 3 * config.moe_intermediate_size)
    dense = 3 * config.intermediate_size
    return residual + max(heads, routed, dense)
