"""The wheel of the running program, for other hosts. It is made of the installed package, without a source folder."""

import base64
import hashlib
import importlib.metadata
import zipfile
from pathlib import Path

import mlx_k2
from mlx_k2.errors import SetupError
from mlx_k2.launch.ssh import WHEEL

_FILE_DATE = (1980, 1, 1, 0, 0, 0)
"""The date of every file in the wheel, so that the same program gives the same bytes."""
_TAGS = "Wheel-Version: 1.0\nGenerator: mlx-k2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def write_wheel(folder: Path) -> Path:
    """Write the wheel to ``folder`` and return its path.

    Raises:
        SetupError: the program runs from a folder and is not installed.
    """
    try:
        distribution = importlib.metadata.distribution("mlx-k2")
    except importlib.metadata.PackageNotFoundError:
        raise SetupError("mlx-k2 runs from a folder here and is not installed: install it first (README)") from None
    package = Path(mlx_k2.__file__).parent
    info_folder = f"mlx_k2-{mlx_k2.__version__}.dist-info"
    contents = {
        f"{package.name}/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    for name in ("METADATA", "entry_points.txt"):
        contents[f"{info_folder}/{name}"] = (distribution.read_text(name) or "").encode()
    contents[f"{info_folder}/WHEEL"] = _TAGS.encode()
    record = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in contents.items()]
    contents[f"{info_folder}/RECORD"] = "\n".join([*record, f"{info_folder}/RECORD,,", ""]).encode()
    path = folder / WHEEL
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            archive.writestr(zipfile.ZipInfo(name, _FILE_DATE), data, zipfile.ZIP_DEFLATED)
    return path


def _digest(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in the form of a wheel's RECORD."""
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
