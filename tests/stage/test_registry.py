"""Tests of the registry of running stages: a process's file counts while the process holds the file's lock."""

import fcntl
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_k2.cluster.host_facts import Command, RunningStage
from mlx_k2.stage.registry import register, running_stages

COMMAND = Command(host="studio-1", pid=123, name="mlx-k2 chat", began_unix_s=1e9)
STAGE = RunningStage(COMMAND, held_bytes=297_300_000_000)
PROGRAM = """
import sys
from pathlib import Path
from mlx_k2.stage.registry import register
from tests.stage.test_registry import STAGE
file = register(STAGE, Path(sys.argv[1]))
print("registered", flush=True)
sys.stdin.read()
"""


@contextmanager
def registered_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run a process that registers STAGE in ``folder``; kill it on exit."""
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "registered\n"
        yield process
        process.kill()


def test_a_stage_is_reported_until_its_process_is_killed_and_its_file_is_then_removed(tmp_path: Path) -> None:
    with registered_process(tmp_path), registered_process(tmp_path) as second:
        assert running_stages(tmp_path) == (STAGE, STAGE)
        second.kill()
        second.wait()
        assert running_stages(tmp_path) == (STAGE,)
    assert running_stages(tmp_path) == ()
    assert list(tmp_path.iterdir()) == []


def test_a_stages_file_is_private_and_a_locked_file_with_other_data_is_not_reported(tmp_path: Path) -> None:
    stage_file = register(STAGE, tmp_path)
    assert stage_file is not None
    with stage_file:
        (path,) = tmp_path.iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for data in (b"[" * 100_000, b'{"held_bytes": 1}', b'"\xff"'):
            damaged = path.with_name(f"1{path.name}")
            with damaged.open("wb") as locked_file:
                fcntl.flock(locked_file, fcntl.LOCK_EX)
                damaged.write_bytes(data)
                assert running_stages(tmp_path) == (STAGE,)


def test_another_hosts_file_in_a_shared_home_folder_is_neither_reported_nor_removed(tmp_path: Path) -> None:
    other = tmp_path / "123@another-host.json"
    other.write_text("{}")
    assert running_stages(tmp_path) == ()
    assert other.exists()


def test_in_a_folder_that_cannot_be_created_no_stage_is_registered_and_none_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert register(STAGE, tmp_path / "file" / "stages") is None
    assert running_stages(tmp_path / "file" / "stages") == ()
