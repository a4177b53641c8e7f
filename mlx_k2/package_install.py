"""The shell command that adds a package to this program's Python environment. Runs nothing."""

import shlex
import sys
from importlib.util import find_spec


def install_command(package: str) -> str:
    """Return the command that installs ``package`` here. uv's environments have no pip."""
    python = shlex.quote(sys.executable)
    if find_spec("pip") is None:
        return f"uv pip install --python {python} {package}"
    return f"{python} -m pip install {package}"
