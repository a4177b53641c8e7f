"""The stages that this user runs on this host: a file for each, which the stage locks until its process ends.

If the folder of these files cannot be used, no stages are reported; this is not an error.
"""

import fcntl
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec

from mlx_k2.cluster.host_facts import RunningStage
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import read_json
from mlx_k2.private_files import home_folder, open_private_no_symlink, state_folder

FOLDER = (state_folder() or home_folder()) / "stages"


def register(stage: RunningStage, folder: Path = FOLDER) -> IO[bytes] | None:
    """Register this process as ``stage``; return the file to keep open, or None if the folder cannot be used."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{os.getpid()}{_suffix()}"
        new_path = path.with_suffix(".new")
        file = open(new_path, "wb", opener=open_private_no_symlink)  # noqa: SIM115 - it stays open
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(msgspec.json.encode(stage))
        file.flush()
        new_path.replace(path)  # so a file at ``path`` is always complete and locked
        return file
    return None


def running_stages(folder: Path = FOLDER) -> tuple[RunningStage, ...]:
    """Return the registered stages whose processes still run. Remove the files of processes that have ended."""
    stages = []
    with suppress(OSError):
        for path in sorted(folder.glob(f"*{_suffix()}")):
            with suppress(OSError, JsonError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: other readers do not look like a stage
                except BlockingIOError:
                    stages.append(read_json(file.read(), RunningStage))
                else:
                    path.unlink()
    return tuple(stages)


def _suffix() -> str:
    """Return the end of the names of this host's files. Several hosts may share a home folder."""
    return f"@{platform.node()}.json"
