"""A program ssh that runs the remote command on this machine, in the home folder of a host."""

import shlex
from pathlib import Path

_SSH = """#!/bin/sh
for word; do command=$word; done
cd {home} && HOME={home} exec sh -c "$command"
"""


def write_ssh(folder: Path, home: Path) -> Path:
    """Write the program to a folder, which is to be put on the path, and return the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "ssh").write_text(_SSH.format(home=shlex.quote(str(home))))
    (folder / "ssh").chmod(0o755)
    return folder
