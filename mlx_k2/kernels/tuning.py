"""How much one simdgroup and one threadgroup own, by chip. Knows no kernel's text.

Published results disagree between chips (8 rows a simdgroup won on an M5, 2 on an M4), so this is a table to be
filled by `mlx-k2 kernels` on each chip. Until a chip has been measured it gets the default.
"""

from typing import NamedTuple


class Tuning(NamedTuple):
    """Sizes of the decode kernels. Powers of two, so that rows * simdgroups divides every multiple of 32."""

    gate_up_rows: int  # of gate, and as many of up, that share one lane's inputs
    gate_up_simdgroups: int  # in a threadgroup
    down_rows: int
    batch_rows: int  # of gate and of up when several tokens share the weights
    batch_simdgroups: int


DEFAULT = Tuning(gate_up_rows=4, gate_up_simdgroups=2, down_rows=4, batch_rows=2, batch_simdgroups=8)

# Nothing measured yet: a row enters with the CSV of the run that shows it.
BY_CHIP: dict[str, Tuning] = {}


def tuning_for(chip: str) -> Tuning:
    """`chip` as MLX names the device, for instance "Apple M3 Ultra"."""
    return BY_CHIP.get(chip, DEFAULT)
