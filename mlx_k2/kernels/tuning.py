"""The kernels' sizes: the work of one simdgroup and of one threadgroup. Knows no kernel's text.

The best sizes differ between chips: published measurements favour 8 rows per simdgroup on an M5, and 2 on an M4.
`mlx-k2 kernels` therefore measures the best sizes on each machine and stores them there. Until then the default is
used.
"""

from typing import NamedTuple


class Tuning(NamedTuple):
    """Sizes of the decode and batch kernels: powers of two, so that rows * simdgroups divides every multiple of 32."""

    gate_up_rows: int  # rows of gate, and as many of up, per simdgroup of the decode kernel
    gate_up_simdgroups: int  # simdgroups per threadgroup of the gate and up kernels, also for batches
    down_rows: int  # rows per simdgroup of the decode kernel
    batch_rows: int  # rows per simdgroup of the batch kernels
    batch_simdgroups: int  # simdgroups per threadgroup of the batch kernel of down


DEFAULT = Tuning(gate_up_rows=4, gate_up_simdgroups=2, down_rows=4, batch_rows=2, batch_simdgroups=8)
