"""Tests of private files: only their owner can read them, and no symbolic link redirects a write."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_k2.cli.repl.saved_chat import SavedChat, save_chat
from mlx_k2.cli.repl.transcript import Transcript
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.run_log import RunLog
from mlx_k2.private_files import open_private, open_private_no_symlink, write_private


@pytest.fixture(autouse=True)
def umask_022() -> Iterator[None]:
    """Set the usual umask, with which other users can read a new file that is not made private."""
    old_umask = os.umask(0o022)
    yield
    os.umask(old_umask)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_written_file_is_private_also_where_it_replaces_one_that_is_not(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    path.write_bytes(b"old")
    assert mode(path) == 0o644
    write_private(path, b"new")
    assert (mode(path), path.read_bytes()) == (0o600, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_can_have_the_longest_name_that_the_system_allows(tmp_path: Path) -> None:
    path = tmp_path / (85 * "谈")  # 255 bytes
    write_private(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_with_the_name_of_the_temporary_file_does_not_redirect_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, path = tmp_path / "target", tmp_path / "chat.json"
    target.write_bytes(b"mine")
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (tmp_path / ".chat.json.known.part").symlink_to(target)
    with pytest.raises(FileExistsError):
        write_private(path, b"new")
    assert target.read_bytes() == b"mine" and not path.exists()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        write_private(path, b"new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_refused_under_a_name_of_the_programs_choice_and_followed_under_the_users(tmp_path: Path) -> None:
    (tmp_path / "stages.log").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic"), open(tmp_path / "stages.log", "ab", opener=open_private_no_symlink):
        pass
    with open(tmp_path / "stages.log", "ab", opener=open_private) as file:  # as for a name that the user chose
        file.write(b"x")
    assert mode(tmp_path / "target") == 0o600


def test_transcripts_saved_chats_and_logs_are_private(tmp_path: Path) -> None:
    with Transcript(tmp_path / "transcript", notify=print) as transcript:
        transcript.write({"command": "/help"})
    save_chat(tmp_path / "chat", SavedChat("model", "digest", messages=[]))
    log = RunLog(tmp_path / "logs", DeploymentListener())
    log.log("[stage 0 here] a line")
    report = log.write_report("a fault", ())
    assert report is not None
    for path in (tmp_path / "transcript", tmp_path / "chat", tmp_path / "logs" / "stages.log", report):
        assert mode(path) == 0o600
