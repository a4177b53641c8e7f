"""Tests of the wheel that the running program makes of itself."""

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


def test_the_wheel_has_the_packages_files_and_a_record_of_all(tmp_path: Path) -> None:
    git = subprocess.run(["git", "ls-files", "mlx_k2"], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(write_wheel(tmp_path)) as archive:
        names = archive.namelist()
        info = f"mlx_k2-{mlx_k2.__version__}.dist-info"
        assert {name for name in names if not name.startswith(info)} >= set(git.stdout.splitlines())
        assert b"\nRequires-Dist: msgspec" in archive.read(f"{info}/METADATA")
        assert b"mlx-k2 = mlx_k2.cli.main:main" in archive.read(f"{info}/entry_points.txt")
        record = list(csv.reader(archive.read(f"{info}/RECORD").decode().splitlines()))
        assert [path for path, _, _ in record] == names
        for path, digest, size in record[:-1]:
            data = archive.read(path)
            expected = urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={expected}", len(data))


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        digests.append(wheel_digest(write_wheel(folder)))
    assert digests[0] == digests[1]


@follows_advice(
    "mlx-k2 runs from a folder here and is not installed: install it first (README)",
)
def test_only_an_installed_program_writes_a_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(tmp_path)
    monkeypatch.setattr("sys.path", [str(ROOT / "mlx_k2")])
    with pytest.raises(SetupError, match="is not installed: install it first"):
        write_wheel(tmp_path)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*pip, str(tmp_path / "installed"), str(wheel)], check=True, timeout=60)
    monkeypatch.setattr("sys.path", [str(tmp_path / "installed")])
    assert write_wheel(tmp_path) == wheel
