"""The stage proper, which the guard starts: python -m mlx_k2.stage.program. Keeps fd 1 for frames alone."""

import os

_PROTOCOL_FD = os.dup(1)
os.dup2(2, 1)  # from here on, whatever prints while it is imported prints to the log

from mlx_k2.stage.buffer_limits import apply_saved_limits  # noqa: E402

apply_saved_limits(os.environ)  # before mlx is imported, which reads it

from mlx_k2.stage.service import serve  # noqa: E402

if __name__ == "__main__":
    serve(inward_fd=0, outward_fd=_PROTOCOL_FD)
