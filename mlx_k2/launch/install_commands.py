"""Commands that install this machine's mlx-k2 on a host. They copy a wheel: no package index has mlx-k2."""

import shlex
import sys
from collections.abc import Mapping

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


def install_versions(ssh: str | None, python: str | None, versions: Mapping[str, str]) -> str:
    """Return what to do to have ``versions`` of packages. ``python`` None is the one that starts a stage."""
    python = python or (sys.executable if ssh is None else "python3")
    own = [install_commands(ssh, python)] if "mlx-k2" in versions else []
    indexed = [f"{name}=={version}" for name, version in versions.items() if name != "mlx-k2"]
    install = command_on(ssh, python, "-m", "pip", "install", *indexed)
    return "; ".join([*own, *([f"`{install}`"] if indexed else [])])
