"""Constants of the performance model in mac_model.py, and published figures that it is compared with.

The constants were chosen before the first comparison and not changed after it. The kind of a source is "published" (by
users), "stated" (by a maker) or "estimated" (here). Issues on GitHub are named by repository and number.
"""

from typing import NamedTuple


class Constant(NamedTuple):
    """A constant of the model. ``kind`` is the kind of its source: published, stated or estimated."""

    value: float
    unit: str
    kind: str
    source: str


CONSTANTS = {
    "dense bandwidth": Constant(
        650e9, "B/s", "published", "94% of the 692 GB/s that an M3 Ultra sustains: jundot/omlx#2238"
    ),
    "expert bandwidth": Constant(387e9, "B/s", "published", "gather_qmm of one token, chained, M3 Ultra: mlx#4509"),
    "own expert bandwidth": Constant(
        500e9,
        "B/s",
        "estimated",
        "for mlx-k2's kernel: more than gather_qmm's 387 GB/s, less than the best kernels' 630",
    ),
    "launch": Constant(2.75e-6, "s", "published", "3,200 dependent small kernels in 8.8 ms, M3 Ultra: mlx#4521"),
    "command buffer": Constant(20e-6, "s", "published", "M3 Ultra, mlx 0.32.2: mlx#4521"),
    "dense operations": Constant(20.5e12, "1/s", "published", "quantized_matmul, M3 Ultra: mlx#4246"),
    "expert operations": Constant(
        16.7e12,
        "1/s",
        "published",
        "14.2e12 / 0.85: with 43 rows per expert on average, 85% of the tiles' rows are used: mlx#4246",
    ),
    "score traffic": Constant(
        14, "B", "estimated", "per query, key and head, to write, mask, normalize and read a score"
    ),
    "fused attention": Constant(
        9e12,
        "1/s",
        "estimated",
        "a guess below the dense operations: MLX 0.32.4's source calls it slow for head dimension 192",
    ),
    "former prompt kernel": Constant(
        0.65, "", "estimated", "mlx-k2's former kernel for experts over MLX's, from a count of cycles for 32 rows"
    ),
    "hop": Constant(450e-6, "s", "published", "300 us over Thunderbolt (Geerling; exo#2173), and two wake-ups"),
    "all-reduce": Constant(50e-6, "s", "published", "RDMA over Thunderbolt 5: under 50 us (Geerling, Dec 2025)"),
    "Python": Constant(
        1e-3, "s", "estimated", "for a token, overlapped by nothing; measured on Linux at about half of a Mac's speed"
    ),
    "M5 bandwidth": Constant(
        1200 / 819, "", "stated", "memory bandwidth of an M5 Ultra over an M3 Ultra (Apple, Aug 2026)"
    ),
    "M5 operations": Constant(
        3.5, "", "estimated", "prompts on the GPU's neural accelerators, by MLX: 3 to 4 times as fast"
    ),
}


class Published(NamedTuple):
    """A published rate in tokens per second, with the program, the model, the bits per weight and the number of Macs.

    ``tokens`` is the context while decoding, or the length of the prompt. If ``first`` is not 0, the rate is that of
    the prompt's chunk from position ``first`` to ``tokens``.
    """

    program: str
    model: str
    expert_bits: float
    dense_bits: float
    num_macs: int
    kind: str  # "decode" or "prefill"
    tokens: int
    rate: float
    source: str
    first: int = 0


# model, bits of an expert weight and of a dense one, with their scales, and number of Macs
_DSV3 = ("DeepSeek-V3", 4.5, 4.5, 1)
_PR839 = "mlx-lm#839, 4 bits, M3 Ultra"
_K25 = ("K2", 3.5, 3.5, 1)
_ISSUE1047 = "mlx-lm#1047, K2.5 in 3 bits, M3 Ultra, times of chunks"
PUBLISHED = (
    Published("mlx-lm expanded", "K2", 5.0, 16, 2, "decode", 1750, 15.0, "MLX's author, Nov 2025, K2-Thinking"),
    Published("llama.cpp", "K2", 4.5, 8.5, 2, "decode", 1000, 18.5, "Geerling, Dec 2025, K2-Thinking, over TCP"),
    Published("mlx-lm TP", "K2", 5.0, 16, 2, "decode", 1000, 20.1, "Hugging Face, K2.7-Code, discussion 7"),
    Published("exo TP", "K2", 5.0, 16, 2, "decode", 1000, 21.6, "Geerling, Dec 2025, K2-Thinking, RDMA"),
    Published("exo TP", "K2", 5.0, 16, 4, "decode", 1000, 28.3, "Geerling, Dec 2025, K2-Thinking, RDMA"),
    Published("mlx-lm", "K2", 3.45, 3.45, 1, "decode", 1000, 21.25, "K2.6 in 3.3 to 3.6 bits, M3 Ultra"),
    *(
        Published("mlx-lm expanded", *_DSV3, "decode", tokens, rate, f"{_PR839}, before")
        for tokens, rate in ((4096, 13.592), (8192, 9.750), (16384, 6.520))
    ),
    *(
        Published("mlx-lm", *_DSV3, "decode", tokens, rate, f"{_PR839}, after")
        for tokens, rate in ((4096, 20.647), (8192, 18.852), (16384, 16.772))
    ),
    *(
        Published("mlx-lm expanded", *_DSV3, "prefill", tokens, rate, f"{_PR839}, before")
        for tokens, rate in ((4096, 199.149), (8192, 176.519), (16384, 139.040))
    ),
    *(
        Published("mlx-lm", *_DSV3, "prefill", tokens, rate, f"{_PR839}, after")
        for tokens, rate in ((4096, 213.337), (8192, 187.632), (16384, 147.876))
    ),
    *(
        Published("mlx-lm", *_K25, "prefill", end, 2048 / seconds, _ISSUE1047, first=end - 2048)
        for end, seconds in ((4096, 8.719), (8192, 10.076), (12288, 11.131), (16384, 12.728), (20480, 14.161))
    ),
    Published("mlx-lm", *_K25, "prefill", 30720, 61.0, f"{_ISSUE1047}, just before memory ran out", first=28672),
    Published("mlx-lm", "K2", 3.45, 3.45, 1, "prefill", 1024, 222.0, "K2.6 in 3.3 to 3.6 bits, M3 Ultra"),
)
