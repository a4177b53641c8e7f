"""The sizes of one simdgroup's and one threadgroup's work. Knows no kernel's text.

Published results differ between chips: 8 rows per simdgroup were fastest on an M5, 2 on an M4. `mlx-k2 kernels`
therefore measures the best sizes on each machine and stores them there. Until then the default is used.
"""

from typing import NamedTuple


class Tuning(NamedTuple):
    """Sizes of the decode kernels. They are powers of two, so that rows * simdgroups divides every multiple of 32."""

    gate_up_rows: int  # rows of gate, and as many of up, that share one lane's inputs
    gate_up_simdgroups: int  # simdgroups per threadgroup
    down_rows: int
    batch_rows: int  # rows of gate and of up when several tokens share the weights
    batch_simdgroups: int


DEFAULT = Tuning(gate_up_rows=4, gate_up_simdgroups=2, down_rows=4, batch_rows=2, batch_simdgroups=8)
