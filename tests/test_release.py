"""Tests of what is released: the wheel and the source archive, run outside the tree, and the pinned versions."""

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

import mlx_k2
from bench.tested_on import ANSWER, QUESTION
from mlx_k2.launch.ssh import WHEEL
from tests.advice import follows_advice
from tests.cli.command import CommandLine

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def build(source: Path, out: Path, *kinds: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *kinds, str(source)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the source archive and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bin folder of a new environment that has the wheel.

    It finds the other packages in this environment, except mlx-k2 itself, which is editable here.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (purelib / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    ran = subprocess.run([*install, "--no-deps", "--no-index", str(dist / WHEEL)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return folder / "bin"


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = CommandLine(folder).environment(**environment)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, env=kept)


@pytest.mark.slow
def test_the_wheel_answers_the_demos_question_outside_the_tree(installed: Path, tmp_path: Path) -> None:
    code = "import mlx_k2; print(mlx_k2.__file__)"
    where = run([str(installed / "python"), "-c", code], tmp_path).stdout.strip()
    assert Path(where).is_relative_to(installed.parent), where
    ran = run([str(installed / "mlx-k2"), "generate", QUESTION], tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == ANSWER


@pytest.mark.slow
def test_the_wheel_finds_its_metal_texts(installed: Path, tmp_path: Path) -> None:
    code = "from mlx_k2.kernels.dispatch import metal_texts; print(len(metal_texts()))"
    texts = [path for path in (ROOT / "mlx_k2" / "kernels").iterdir() if path.suffix in (".metal", ".h")]
    assert run([str(installed / "python"), "-c", code], tmp_path).stdout.strip() == str(len(texts)) != "0"


@follows_advice(
    "--tools and --mcp need the package mcp: run `python -m pip install mcp`",
)
@pytest.mark.slow
def test_without_mcp_the_command_runs_and_tools_name_the_package_to_install(installed: Path, tmp_path: Path) -> None:
    """Put a package named mcp that cannot be imported first in the path: mcp is missing without the extra "tools"."""
    missing = tmp_path / "missing" / "mcp"
    missing.mkdir(parents=True)
    (missing / "__init__.py").write_text('raise ModuleNotFoundError("No module named mcp", name="mcp")\n')
    (tmp_path / "tools.py").write_text("def roll() -> int:\n    return 4\n")
    generate = [str(installed / "mlx-k2"), "generate", "--stages", "1", QUESTION]
    hidden = str(missing.parent)
    plain = run(generate, tmp_path, PYTHONPATH=hidden)
    assert plain.stdout.strip() == ANSWER, plain.stderr
    with_tools = run([*generate, "--tools", "tools.py"], tmp_path, PYTHONPATH=hidden)
    assert with_tools.returncode == 2
    assert f"need the package mcp: run `{installed / 'python'} -m pip install mcp`" in with_tools.stderr


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(dist: Path) -> None:
    tracked = subprocess.run(["git", "ls-files", "mlx_k2"], cwd=ROOT, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(dist / WHEEL) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == set(tracked.stdout.splitlines())


@pytest.mark.slow
def test_the_tree_and_the_source_archive_build_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    build(ROOT, tmp_path, "--wheel")
    digests = {hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest() for folder in (dist, tmp_path)}
    assert len(digests) == 1


def test_the_version_of_the_package_is_the_projects() -> None:
    assert mlx_k2.__version__ == PYPROJECT["project"]["version"]


def requirements() -> Iterator[Requirement]:
    """Yield the requirements of pyproject.toml that apply here: of the package, its extras, and the group dev."""
    project = PYPROJECT["project"]
    groups = [
        project["dependencies"],
        PYPROJECT["dependency-groups"]["dev"],
        *project["optional-dependencies"].values(),
    ]
    for line in itertools.chain.from_iterable(groups):
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_constraints_pin_every_package_that_make_installs() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {normalized(name): version for name, version in pins.items()}
    found: set[tuple[str, str]] = set()
    to_visit = list(requirements())
    for requirement in to_visit:
        assert requirement.specifier.contains(pinned[normalized(requirement.name)]), requirement
    while to_visit:
        requirement = to_visit.pop()
        for extra in requirement.extras or {""}:
            key = (normalized(requirement.name), extra)
            if key in found:
                continue
            found.add(key)
            for line in importlib.metadata.requires(requirement.name) or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    to_visit.append(needed)
    assert {name for name, _ in found} <= pinned.keys()
    assert not [line for line in lines if "/" in line or "@" in line], "a place that packages come from"


def test_the_actions_of_the_workflows_are_pinned_by_commit() -> None:
    workflows = list((ROOT / ".github" / "workflows").glob("*.yml"))
    used = [line for path in workflows for line in path.read_text().splitlines() if "uses:" in line]
    assert len(used) >= 7
    assert [line for line in used if not re.search(r"uses: [\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", line)] == []
