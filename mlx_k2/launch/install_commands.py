"""Commands that install this machine's mlx-k2 on a host. They copy a wheel: no package index has mlx-k2."""

import shlex

import mlx_k2
from mlx_k2.launch.ssh import command_on

WHEEL = f"mlx_k2-{mlx_k2.__version__}-py3-none-any.whl"


def install_commands(ssh: str | None, python: str) -> str:
    """Return what to do, with the commands between backticks; ``ssh`` None is this machine."""
    build = "run `make dist` in mlx-k2's source folder, then"
    if ssh is None:
        return f"{build} `{command_on(None, python, '-m', 'pip', 'install', f'dist/{WHEEL}')}`"
    install = command_on(ssh, python, "-m", "pip", "install", f"./{WHEEL}")
    return f"{build} `scp dist/{WHEEL} {shlex.quote(f'{ssh}:')}` and `{install}`"
