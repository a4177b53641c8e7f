"""A real stage that causes a fault of NAMES at the next step after ``request_fault``.

As a program: faulty_stage.py FOLDER, to be started by a guard. A file in FOLDER with the name of a fault requests it.
"""

import os
import sys
import time
from pathlib import Path

from mlx_k2.model.stage_model import StageModel
from mlx_k2.protocol.framing import Kind, encode_frame
from mlx_k2.stage.service import serve

NAMES = ("exception", "print", "rubbish", "half-frame", "flood", "clock")
FLOOD_BYTES = 10_000_000
GUARD_PROGRAM = (
    "import os, sys; from mlx_k2.guard.guard import run_guard; "
    "os._exit(run_guard([sys.executable, '-m', 'tests.emulated_hosts.faulty_stage', sys.argv[1]]))"
)


def faulty_python(folder: Path) -> str:
    """Make ``folder`` with a stand-in for a host's Python that runs a guard over a faulty stage; return its path."""
    folder.mkdir()
    script = folder / "python"
    script.write_text(
        f'#!/bin/sh\ncd {Path(__file__).parents[2]}\nexec {sys.executable} -c "{GUARD_PROGRAM}" {folder}\n'
    )
    script.chmod(0o755)
    return str(script)


def request_fault(folder: Path, name: str) -> None:
    """Cause the fault ``name`` at the next step of the stage of ``folder``."""
    assert name in NAMES
    (folder / name).touch()


def cause_fault(name: str, folder: Path, protocol_fd: int) -> None:
    """Cause a fault of NAMES. "clock" is no fault: it writes the stage's wall clock to the file ``clock-report``."""
    match name:
        case "exception":
            raise ValueError("a fault inside a layer")
        case "print":
            sys.stdout.write("printed on stdout\n" * 1000)
            sys.stdout.flush()
        case "rubbish":
            os.write(protocol_fd, b"\xff" * 64)
        case "half-frame":
            os.write(protocol_fd, encode_frame(Kind.MESSAGE, b"x" * 100)[:50])
            os._exit(1)
        case "flood":
            sys.stderr.write(("x" * 99 + "\n") * (FLOOD_BYTES // 100))
        case "clock":
            (folder / "clock-report").write_text(str(time.time()))


def main(folder: Path) -> None:
    protocol_fd = os.dup(1)
    os.dup2(2, 1)  # as in mlx_k2.stage.program
    run = StageModel.run

    def run_with_faults(*arguments: object) -> object:
        for name in NAMES:
            if (folder / name).exists():
                (folder / name).unlink()
                cause_fault(name, folder, protocol_fd)
        return run(*arguments)  # type: ignore[arg-type]

    StageModel.run = run_with_faults  # type: ignore[assignment,method-assign]
    serve(inward_fd=0, outward_fd=protocol_fd)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
