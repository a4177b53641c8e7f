"""Empty wheels with the names and versions of mlx-k2's requirements, so that pip can install them without an index.

The wheel of click makes this environment's packages importable, so that an installed mlx-k2 runs.
"""

import importlib.metadata
import re
import zipfile
from pathlib import Path

import click
from packaging.requirements import Requirement


def write_stub_wheels(folder: Path) -> Path:
    """Make ``folder``, write a wheel for each package that mlx-k2 requires to it, and return it."""
    folder.mkdir()
    for line in importlib.metadata.requires("mlx-k2") or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _write_wheel(folder, requirement)
    return folder


def _write_wheel(folder: Path, requirement: Requirement) -> None:
    name, version = re.sub(r"[-_.]+", "_", requirement.name), importlib.metadata.version(requirement.name)
    info_folder = f"{name}-{version}.dist-info"
    extras = "".join(f"Provides-Extra: {extra}\n" for extra in requirement.extras)
    files = {
        f"{info_folder}/METADATA": f"Metadata-Version: 2.1\nName: {requirement.name}\nVersion: {version}\n{extras}",
        f"{info_folder}/WHEEL": "Wheel-Version: 1.0\nGenerator: stub\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    if requirement.name == "click":
        files["others.pth"] = f"{Path(click.__file__).parents[1]}\n"
    files[f"{info_folder}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info_folder}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
