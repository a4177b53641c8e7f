"""The program that a host runs: the guard, which starts the stage program. Standard library only."""

import os
import sys
from pathlib import Path
from typing import NoReturn

from mlx_k2.guard.guard import run_guard


def main() -> NoReturn:
    """Run the guard over this process's stdin and stdout until the stage ends."""
    try:
        Path.cwd()
    except FileNotFoundError:  # the user's current folder was deleted, and packages that the stage imports need one
        os.chdir("/")
    exit_code = run_guard([sys.executable, "-P", "-m", "mlx_k2.stage.program"])
    os._exit(exit_code)  # a thread may still be blocked on stdin or stdout; nothing is left to clean up


if __name__ == "__main__":
    main()
