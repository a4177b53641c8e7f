"""Tests of the wheel that the running program makes from its own files."""

import csv
import hashlib
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest

import mlx_k2
from mlx_k2.errors import SetupError
from mlx_k2.launch.own_wheel import write_wheel
from mlx_k2.launch.remote_install import wheel_digest
from tests.advice import follows_advice

ROOT = Path(mlx_k2.__file__).parents[1]


def test_the_wheel_has_all_files_of_the_package_and_records_their_digests(tmp_path: Path) -> None:
    git = subprocess.run(["git", "ls-files", "mlx_k2"], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(write_wheel(tmp_path)) as archive:
        names = archive.namelist()
        info_folder = f"mlx_k2-{mlx_k2.__version__}.dist-info"
        assert {name for name in names if not name.startswith(info_folder)} >= set(git.stdout.splitlines())
        assert b"\nRequires-Dist: msgspec" in archive.read(f"{info_folder}/METADATA")
        assert b"mlx-k2 = mlx_k2.cli.main:main" in archive.read(f"{info_folder}/entry_points.txt")
        record = list(csv.reader(archive.read(f"{info_folder}/RECORD").decode().splitlines()))
        assert [path for path, _, _ in record] == names
        for path, digest, size in record[:-1]:  # the last line, for RECORD itself, has no digest
            data = archive.read(path)
            expected = urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={expected}", len(data))


def test_two_wheels_of_the_same_program_have_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    assert wheel_digest(write_wheel(tmp_path)) == wheel_digest(write_wheel(tmp_path / "second"))


@follows_advice(
    "mlx-k2 runs from a folder here and is not installed: install it first (README)",
)
def test_an_installed_program_writes_a_wheel_and_a_program_in_a_folder_advises_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = write_wheel(tmp_path)
    digest = wheel_digest(wheel)
    monkeypatch.setattr("sys.path", [str(ROOT / "mlx_k2")])  # a folder without the metadata of mlx-k2
    with pytest.raises(SetupError, match="is not installed: install it first"):
        write_wheel(tmp_path)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(tmp_path / "installed"), str(wheel)], check=True, timeout=60)
    monkeypatch.setattr("sys.path", [str(tmp_path / "installed")])
    assert wheel_digest(write_wheel(tmp_path)) == digest
