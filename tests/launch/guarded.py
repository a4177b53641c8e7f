"""Stand-in for a host's Python: it runs the guard with one of the programs of stage_programs.py as its stage."""

import os
import sys
from pathlib import Path

from mlx_k2.guard.guard import run_guard

STAGE_PROGRAMS = Path(__file__).with_name("stage_programs.py")


def stand_in_python(folder: Path, program: str) -> str:
    """Write to ``folder`` a script that ignores its arguments and runs ``program`` as a stage; return its path."""
    script = folder / f"python-{program}"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {Path(__file__)} {program}\n")
    script.chmod(0o755)
    return str(script)


if __name__ == "__main__":
    os._exit(run_guard([sys.executable, str(STAGE_PROGRAMS), *sys.argv[1:]]))
