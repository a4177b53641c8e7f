"""A replacement of ssh that runs the remote command on this machine, in a folder that is the remote host's home."""

import shlex
from pathlib import Path

_SSH = """#!/bin/sh
for argument; do command=$argument; done  # the last argument is the remote command
cd {home} && HOME={home} exec sh -c "$command"
"""


def write_ssh(folder: Path, home: Path) -> Path:
    """Write the program to ``folder`` and return that folder. A caller puts it first in PATH."""
    folder.mkdir(exist_ok=True)
    (folder / "ssh").write_text(_SSH.format(home=shlex.quote(str(home))))
    (folder / "ssh").chmod(0o755)
    return folder
