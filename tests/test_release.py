"""Tests of a release: the wheel and the source archive, run outside the repository, and the pinned versions."""

import hashlib
import importlib.metadata
import itertools
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mlx_k2
from bench.tested_on import ANSWER, QUESTION
from mlx_k2.launch.ssh import WHEEL
from tests.advice import follows_advice
from tests.cli.command import CommandLine

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def build(folder: Path, *options: str) -> None:
    """Build the package into ``folder`` with further ``options`` of `python -m build`."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), *options, str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the source archive and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def wheel_bin(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of a new environment that has the wheel. It imports other packages from this environment.

    It cannot import this environment's editable mlx-k2, whose import hook is not active there.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (purelib / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    result = subprocess.run([*install, "--no-deps", "--no-index", str(dist / WHEEL)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder / "bin"


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = CommandLine(folder).environment(**environment)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=variables)


@pytest.mark.slow
def test_the_wheel_answers_the_demos_question_outside_the_repository(wheel_bin: Path, tmp_path: Path) -> None:
    code = "import mlx_k2; print(mlx_k2.__file__)"
    file = run([str(wheel_bin / "python"), "-c", code], tmp_path).stdout.strip()
    assert Path(file).is_relative_to(wheel_bin.parent), file
    result = run([str(wheel_bin / "mlx-k2"), "generate", QUESTION], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ANSWER


@pytest.mark.slow
def test_the_wheel_has_all_metal_sources(wheel_bin: Path, tmp_path: Path) -> None:
    code = "from mlx_k2.kernels.dispatch import metal_texts; print(len(metal_texts()))"
    sources = [path for path in (ROOT / "mlx_k2" / "kernels").iterdir() if path.suffix in (".metal", ".h")]
    assert run([str(wheel_bin / "python"), "-c", code], tmp_path).stdout.strip() == str(len(sources)) != "0"


@follows_advice(
    "--tools and --mcp need the package mcp: run `python -m pip install mcp`",
)
@pytest.mark.slow
def test_without_mcp_the_command_runs_and_tools_name_the_package_to_install(wheel_bin: Path, tmp_path: Path) -> None:
    """Put a package mcp that cannot be imported first in Python's path, as if the extra "tools" were not installed."""
    broken_mcp = tmp_path / "path" / "mcp"
    broken_mcp.mkdir(parents=True)
    (broken_mcp / "__init__.py").write_text('raise ModuleNotFoundError("No module named mcp", name="mcp")\n')
    (tmp_path / "tools.py").write_text("def roll() -> int:\n    return 4\n")
    generate = [str(wheel_bin / "mlx-k2"), "generate", "--stages", "1", QUESTION]
    python_path = str(broken_mcp.parent)
    without_tools = run(generate, tmp_path, PYTHONPATH=python_path)
    assert without_tools.stdout.strip() == ANSWER, without_tools.stderr
    with_tools = run([*generate, "--tools", "tools.py"], tmp_path, PYTHONPATH=python_path)
    assert with_tools.returncode == 2
    assert f"need the package mcp: run `{wheel_bin / 'python'} -m pip install mcp`" in with_tools.stderr


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(dist: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "mlx_k2"], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(dist / WHEEL) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == set(tracked.stdout.splitlines())


@pytest.mark.slow
def test_the_repository_and_the_source_archive_build_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    build(tmp_path, "--wheel")
    digests = {hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest() for folder in (dist, tmp_path)}
    assert len(digests) == 1


def test_the_version_of_the_package_is_the_projects() -> None:
    assert mlx_k2.__version__ == PYPROJECT["project"]["version"]


def requirements() -> Iterator[Requirement]:
    """Yield the requirements of the package, its extras and the group dev that apply to this machine."""
    project = PYPROJECT["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    for line in (*project["dependencies"], *PYPROJECT["dependency-groups"]["dev"], *extras):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def test_the_constraints_pin_every_package_that_make_installs() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    version_of = {canonicalize_name(name): version for name, version in pins.items()}
    visited: set[tuple[str, str]] = set()  # the name of a package, and an extra of it
    to_visit = list(requirements())
    for requirement in to_visit:
        assert requirement.specifier.contains(version_of[canonicalize_name(requirement.name)]), requirement
    while to_visit:
        requirement = to_visit.pop()
        for extra in requirement.extras or {""}:
            package = (canonicalize_name(requirement.name), extra)
            if package in visited:
                continue
            visited.add(package)
            for line in importlib.metadata.requires(requirement.name) or ():
                dependency = Requirement(line)
                if dependency.marker is None or dependency.marker.evaluate({"extra": extra}):
                    to_visit.append(dependency)
    assert {name for name, _ in visited} <= version_of.keys()
    assert not [line for line in lines if "/" in line or "@" in line], "an address of a package"


def test_the_actions_of_the_workflows_are_pinned_by_commit() -> None:
    workflows = list((ROOT / ".github" / "workflows").glob("*.yml"))
    lines = [line for path in workflows for line in path.read_text().splitlines() if "uses:" in line]
    assert len(lines) >= 7, "the workflows use fewer actions, or several on a line"
    assert [line for line in lines if not re.search(r"uses: [\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line)] == []
