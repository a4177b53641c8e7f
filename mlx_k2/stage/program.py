"""The stage program, started by the guard: python -m mlx_k2.stage.program. Reserves its stdout for frames."""

import os

_PROTOCOL_FD = os.dup(1)
os.dup2(2, 1)  # output that modules print on import now goes to the log (stderr)

from mlx_k2.stage.mlx_settings import apply_settings, chip_name  # noqa: E402

_SETTING_WARNINGS = apply_settings(os.environ, chip_name())  # before mlx is imported, because mlx reads the environment

import mlx.core as mx  # noqa: E402

from mlx_k2.stage.service import serve  # noqa: E402

if os.environ.get("MLX_K2_DEVICE") == "cpu":  # use MLX's CPU back end on a Mac too, as the tests do
    mx.set_default_device(mx.cpu)

if __name__ == "__main__":
    serve(inward_fd=0, outward_fd=_PROTOCOL_FD, warnings=_SETTING_WARNINGS)
