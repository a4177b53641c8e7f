"""The installation of this program on another host over ssh: looks for a Python, copies a wheel, installs it.

It asks no questions. It writes only below INSTALL_FOLDER in the host's home folder, except that pip fills its own
cache. Each step can be repeated.
"""

import hashlib
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mlx_k2.errors import SetupError
from mlx_k2.launch.ssh import SSH_EXIT_CODE, explain_ssh_failure, ssh_command

INSTALL_FOLDER = ".local/share/mlx-k2"  # the folder of the Python environment, below the home folder of a host
OLDEST_PYTHON = (3, 11)
SURVEY_TIMEOUT_S = 60.0
INSTALL_TIMEOUT_S = 1800.0
_MARK = "mlx-k2: "  # the start of each line of the survey's output; other lines are of the login shell
# The versions of Python 3 to look for, newest first.
_MINOR_VERSIONS = " ".join(str(minor) for minor in range(20, OLDEST_PYTHON[1] - 1, -1))

# Prints lines of _MARK, a key and a value. The value of `python` is its version, then "pip" if it can make environments
# or "-", then its path.
# Only macOS has sw_vers. There /usr/bin/python3 opens a window that offers Xcode's tools, unless they are installed.
_SURVEY = """
report() {{ printf '{mark}%s\\n' "$*"; }}
report home "$HOME"
report system "$(uname -s) $(sw_vers -productVersion 2>/dev/null || uname -r)"
report memory "$(sysctl -n hw.memsize 2>/dev/null || awk '/MemTotal/ {{printf "%.0f", $2 * 1024}}' /proc/meminfo)"
"$HOME"/{folder}/env/bin/python -P -c 'import mlx_k2' 2>/dev/null \\
    && report installed "$(cat "$HOME"/{folder}/installed 2>/dev/null)"
look() {{
    found=$("$1" -c 'import importlib.util as u, sys
print("%d.%d.%d" % sys.version_info[:3], "pip" if u.find_spec("ensurepip") else "-", sys.executable)' 2>/dev/null) \\
        && report python $found
}}
given={python}
if [ -n "$given" ]; then look "$given"; exit 0; fi
for minor in {minor_versions}; do
    for folder in /opt/homebrew/bin /usr/local/bin /opt/local/bin "$HOME"/.local/bin /usr/bin; do
        [ -x "$folder/python3.$minor" ] && look "$folder/python3.$minor"
    done
    [ -x /Library/Frameworks/Python.framework/Versions/3.$minor/bin/python3 ] \\
        && look /Library/Frameworks/Python.framework/Versions/3.$minor/bin/python3
done
for python in "$HOME"/.pyenv/versions/*/bin/python3 "$HOME"/.local/share/uv/python/*/bin/python3; do
    [ -x "$python" ] && look "$python"
done
if [ -x /usr/bin/sw_vers ] && ! xcode-select -p >/dev/null 2>&1; then exit 0; fi
look "$("${{SHELL:-sh}}" -lc 'command -v python3' 2>/dev/null </dev/null | tail -n 1)"
exit 0
"""

# The first pip installs dependencies, but keeps another wheel of the same version; the second pip replaces this one.
_INSTALL = """
set -e
cd "$HOME"/{folder}
rm -f installed
[ -x env/bin/python ] && env/bin/python -c 'import pip, sys; sys.exit(sys.version_info < {oldest})' 2>/dev/null \\
    || {python} -m venv --clear env
pip() {{ env/bin/python -m pip --disable-pip-version-check install --quiet "$@"; }}
pip {options} {pins} incoming/{wheel}
pip --no-index --no-deps --force-reinstall incoming/{wheel}
env/bin/python -P -c 'import mlx_k2'
rm -rf incoming
printf '%s' {digest} >installed
"""


@dataclass(frozen=True)
class HostSurvey:
    """Facts that a host reported."""

    host: str
    home: str
    """The path of the user's home folder."""
    system: str
    memory_bytes: int
    pythons: tuple[tuple[tuple[int, ...], str], ...]
    """Version and path of each Python that was found."""
    python: str | None
    """The path of the Python to install with; None if none is usable."""
    installed_digest: str
    """The digest of the wheel that is installed there and can be imported; '' for none."""

    @property
    def environment_python(self) -> str:
        """The path of the Python of the environment on that host."""
        return f"{self.home}/{INSTALL_FOLDER}/env/bin/python"

    @property
    def problem(self) -> str | None:
        """The reason why mlx-k2 cannot be installed there, and what to do; None if it can."""
        if self.python is not None:
            return None
        oldest = ".".join(map(str, OLDEST_PYTHON))
        if not self.pythons:
            return f"no Python was found: install Python {oldest} or newer there, or name one with --python"
        version, path = max(self.pythons)
        newest = ".".join(map(str, version))
        if version >= OLDEST_PYTHON:
            return f"its Python {newest} ({path}) cannot make environments: install its venv package (python3-venv)"
        is_apples = path.startswith(("/usr/bin", "/Applications/Xcode", "/Library/Dev"))
        origin = ", which comes with macOS" if is_apples else ""
        return (
            f"its newest Python is {newest} ({path}{origin}) and mlx-k2 needs {oldest}: "
            "install a newer one there, for instance with `brew install python@3.13`, or name one with --python"
        )


def survey(host: str, python: str | None = None) -> HostSurvey:
    """Ask a host for its system, memory and Pythons, and change nothing there. Look only at ``python`` if it is given.

    Raises:
        SetupError: ssh cannot reach the host, it does not answer, or ``python`` does not run there.
    """
    script = _SURVEY.format(
        mark=_MARK, folder=INSTALL_FOLDER, python=shlex.quote(python or ""), minor_versions=_MINOR_VERSIONS
    )
    output = _run_script(host, script, SURVEY_TIMEOUT_S)
    facts: dict[str, list[str]] = {}
    for line in output.splitlines():
        if line.startswith(_MARK):
            key, _, value = line.removeprefix(_MARK).partition(" ")
            facts.setdefault(key, []).append(value.strip())
    if "home" not in facts:
        raise SetupError(f"{host} ran no command: see what `ssh {shlex.quote(host)} uname` prints")
    pythons, usable = [], []
    for line in facts.get("python", []):
        version, pip, path = line.split(" ", 2)
        numbers = tuple(map(int, version.split(".")))
        pythons.append((numbers, path))
        if pip == "pip" and numbers[:2] >= OLDEST_PYTHON:
            usable.append((numbers[:2] == sys.version_info[:2], numbers, path))  # first this version, then the newest
    if python is not None and not pythons:
        raise SetupError(f"its {python} is no Python that runs there: leave --python out, or name another")
    memory = facts.get("memory", ["0"])[0]
    system = re.sub(r"^Darwin ", "macOS ", facts["system"][0])
    return HostSurvey(
        host=host,
        home=facts["home"][0],
        system=system,
        memory_bytes=int(memory) if memory.isdigit() else 0,
        pythons=tuple(pythons),
        python=max(usable)[2] if usable else None,
        installed_digest=facts.get("installed", [""])[0],
    )


def wheel_digest(wheel: Path) -> str:
    """Return the SHA-256 of a wheel, by which ``survey`` reports what is installed."""
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def install(target: HostSurvey, wheel: Path, pins: Sequence[str], wheels: Path | None) -> None:
    """Copy the wheel to a host and install it in an environment of its own, with the packages ``pins`` (name==version).

    ``wheels`` is a folder with the wheels of all packages, which are copied, too; None: the host fetches them.

    Raises:
        SetupError: a step failed; gives a line of its output.
    """
    assert target.python is not None, "the survey has found a Python"
    paths = [wheel] if wheels is None else [wheel, *wheels.glob("*.whl")]
    _copy(target.host, {path.name: path for path in paths})
    script = _INSTALL.format(
        folder=INSTALL_FOLDER,
        oldest=OLDEST_PYTHON,
        python=shlex.quote(target.python),
        options="" if wheels is None else "--no-index --find-links incoming",
        pins=shlex.join(pins),
        wheel=wheel.name,
        digest=wheel_digest(wheel),
    )
    try:
        _run_script(target.host, script, INSTALL_TIMEOUT_S)
    except SetupError as error:
        if wheels is None and re.search("No matching distribution|ConnectionError|Temporary failure", str(error)):
            hint = "if it reaches no package index, give --wheels DIR with the wheels of all packages"
            raise SetupError(f"{error}; {hint}") from None
        raise


def _copy(host: str, files: Mapping[str, Path]) -> None:
    """Copy files to the folder ``incoming`` of a host, as one archive over one connection."""
    incoming = f"{INSTALL_FOLDER}/incoming"
    unpack = f'cd "$HOME" && rm -rf {incoming} && mkdir -p {incoming} && tar -xf - -C {incoming}'
    with tempfile.TemporaryFile() as archive:
        with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
            for name, path in files.items():
                tar.add(path, name)
        archive.seek(0)
        _run(host, f"sh -c {shlex.quote(unpack)}", archive, INSTALL_TIMEOUT_S)


def _run(host: str, command: str, stdin: IO[bytes], timeout_s: float) -> str:
    """Run a command on a host and return its output.

    Raises:
        SetupError: ssh or the command failed, or took longer than ``timeout_s``.
    """
    try:
        result = subprocess.run(
            ssh_command(host, command), stdin=stdin, capture_output=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        raise SetupError(f"{host} did not answer within {timeout_s:.0f} s") from None
    stderr = result.stderr.decode(errors="replace")
    if result.returncode == SSH_EXIT_CODE:
        raise SetupError(explain_ssh_failure(host, stderr))
    if result.returncode:
        lines = [line for line in stderr.splitlines() if line.strip()] or [f"exit code {result.returncode}"]
        # the last line may be a notice of pip after the error
        error_lines = [line for line in lines if re.search("[Ee]rror", line)]
        raise SetupError((error_lines or lines)[-1].strip())
    return result.stdout.decode(errors="replace")


def _run_script(host: str, script: str, timeout_s: float) -> str:
    """Run a script with ``sh`` on a host, whatever the user's shell is there. Return and raise as _run does."""
    with tempfile.TemporaryFile() as file:
        file.write(script.encode())
        file.seek(0)
        return _run(host, "sh -s", file, timeout_s)
