"""The ssh command line, shell commands for the user, and explanations of ssh's failures. Knows no stages or frames."""

import ipaddress
import shlex
import sys
from collections.abc import Mapping

from mlx_k2 import __version__

WHEEL = f"mlx_k2-{__version__}-py3-none-any.whl"
CONNECT_TIMEOUT_S = 10
SSH_EXIT_CODE = 255
"""The exit code of ssh's own failures; any other exit code is the remote command's."""

_OPTIONS = {
    "BatchMode": "yes",  # never prompt: there may be no terminal, and several clients start at once
    "ConnectTimeout": str(CONNECT_TIMEOUT_S),
    "ServerAliveInterval": "2",  # seconds: a silent connection ends after 2 s x 3
    "ServerAliveCountMax": "3",
    "ControlMaster": "no",  # a shared connection could outlive this client, or end before it
    "ControlPath": "none",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",
    "LogLevel": "ERROR",
}

# Texts in ssh's stderr, and an explanation with the command that fixes it. The first match counts. {host} may have a
# user, {name} has none.
_FAILURES = (
    (
        ("REMOTE HOST IDENTIFICATION HAS CHANGED", "has changed and you have requested strict checking"),
        "its host key is not the one that ssh knows: if the machine was reinstalled, remove the old key with "
        "`ssh-keygen -R {name}`, then run `ssh {host}` once and compare the new one",
    ),
    (
        ("Host key verification failed", "host key is known"),
        "ssh does not know its host key: run `ssh {host}` once and accept it, "
        "or `ssh-keyscan {name} >> ~/.ssh/known_hosts`",
    ),
    (
        ("Permission denied", "Too many authentication failures"),
        "it refused this user's key: run `ssh-copy-id {host}`, then see that `ssh {host} true` asks for no password",
    ),
    (
        ("Could not resolve hostname",),
        "its name cannot be resolved: check its spelling{local}, or give it a HostName in ~/.ssh/config",
    ),
    (
        ("Connection refused",),
        "it accepts no ssh connections: switch on Remote Login in its sharing settings, "
        "or run `sudo systemsetup -setremotelogin on` on it",
    ),
    (
        ("timed out", "No route to host", "Network is unreachable", "Host is down"),
        "it cannot be reached: see that it is switched on, awake and on this network with `ping {name}`",
    ),
)


def ssh_command(host: str, remote_command: str) -> tuple[str, ...]:
    """Return the command that runs ``remote_command`` on ``host`` by the system's ssh with the user's configuration."""
    options = [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]
    return ("ssh", "-T", *options, "--", host, remote_command)


def explain_ssh_failure(host: str, stderr: str) -> str:
    """Explain why ssh could not connect to ``host``, with the command that fixes it."""
    name = host.rpartition("@")[2]  # ssh-keygen, ssh-keyscan and ping take no user
    local = "" if _has_domain_or_is_address(name) else f" (a Mac may answer to {host}.local)"
    for texts, explanation in _FAILURES:
        if any(text in stderr for text in texts):
            return explanation.format(host=shlex.quote(host), name=shlex.quote(name), local=local)
    lines = stderr.strip().splitlines()
    return f"ssh failed: {lines[-1] if lines else 'it printed no reason'}; try `ssh {shlex.quote(host)} true`"


def command_on(host: str | None, *words: str) -> str:
    """Return the line for a shell on this machine that runs a command on ``host``; None: on this machine, too.

    A path that begins with ``~/`` is in the home folder of ``host``.
    """
    line = " ".join(f"~/{shlex.quote(word[2:])}" if word.startswith("~/") else shlex.quote(word) for word in words)
    if host is None:
        return line
    if line != " ".join(words) or "~" in line:
        line = shlex.quote(line)  # the shells of both hosts parse it
    return f"ssh {shlex.quote(host)} {line}"


def install_commands(ssh: str | None, python: str) -> str:
    """Return how to install this machine's mlx-k2 on host ``ssh``, with commands between backticks; None: here.

    The commands copy a wheel: no package index has mlx-k2.
    """
    build = "run `make dist` in mlx-k2's source folder, then"
    if ssh is None:
        return f"{build} `{command_on(None, python, '-m', 'pip', 'install', f'dist/{WHEEL}')}`"
    install = command_on(ssh, python, "-m", "pip", "install", f"./{WHEEL}")
    return f"{build} `scp dist/{WHEEL} {shlex.quote(f'{ssh}:')}` and `{install}`"


def install_versions(ssh: str | None, python: str | None, versions: Mapping[str, str]) -> str:
    """Return how to install packages on host ``ssh``; None: here. ``python`` None: this Python here, else python3."""
    if python is None:
        python = sys.executable if ssh is None else "python3"
    commands = []
    if "mlx-k2" in versions:
        commands.append(install_commands(ssh, python))
    indexed = [f"{name}=={version}" for name, version in versions.items() if name != "mlx-k2"]
    if indexed:
        commands.append(f"`{command_on(ssh, python, '-m', 'pip', 'install', *indexed)}`")
    return "; ".join(commands)


def _has_domain_or_is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." in name
    return True
