"""A stand-in for a host's Python. It ignores its arguments and runs the guard over one of the small stages."""

import os
import sys
from pathlib import Path

from mlx_k2.guard.guard import run_guard

STAGE_PROGRAMS = Path(__file__).with_name("stage_programs.py")


def stand_in_python(folder: Path, program: str) -> str:
    """Make a stand-in that runs ``program`` in ``folder`` and return its path."""
    script = folder / f"python-{program}"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {Path(__file__)} {program}\n")
    script.chmod(0o755)
    return str(script)


if __name__ == "__main__":
    os._exit(run_guard([sys.executable, str(STAGE_PROGRAMS), *sys.argv[1:]]))
