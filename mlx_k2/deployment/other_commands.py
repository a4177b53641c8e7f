"""Other mlx-k2 commands whose stages run on the same hosts. Knows no plan."""

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from mlx_k2.cluster.host_facts import Command, RunningStage
from mlx_k2.cluster.memory import GB
from mlx_k2.protocol.messages import Hello

MIN_NAMED_BYTES = GB  # commands that hold less memory on a host are not named to the user
_LOOPBACK_STARTS = tuple(
    f"{scheme}://{name}" for scheme in ("http", "https") for name in ("127.", "localhost", "[::1]")
)


def this_command(address: str | None = None) -> Command:
    """Return this process as a command that serves at ``address``.

    Its name has the subcommand, and no other arguments, which may hold a prompt.
    """
    name = Path(sys.argv[0]).name
    if name == "mlx-k2":
        name = " ".join([name, *sys.argv[1:2]])
    return Command(socket.gethostname(), os.getpid(), name, psutil.Process().create_time(), address)


def other_bytes(hello: Hello, own: Command) -> int:
    """Return the bytes that stages of commands other than ``own``, this one, hold on a stage's host."""
    return sum(stage.held_bytes for stage in _stages_of_others(hello, own))


def describe_others(
    hosts: Sequence[str], hellos: Sequence[Hello], own: Command, min_bytes: int = MIN_NAMED_BYTES
) -> list[str]:
    """Return a line for each command other than ``own``, this one, that holds at least ``min_bytes`` on a host.

    The stage on ``hosts[i]`` sent ``hellos[i]``. If a host has several stages, the Hello of the last one counts.
    """
    lines = []
    for host, hello in dict(zip(hosts, hellos, strict=True)).items():
        others = _stages_of_others(hello, own)
        for command in dict.fromkeys(stage.command for stage in others):
            held = [stage.held_bytes for stage in others if stage.command == command]
            if sum(held) >= min_bytes:
                lines.append(_describe(host, command, len(held), sum(held), own))
    return lines


def _stages_of_others(hello: Hello, own: Command) -> list[RunningStage]:
    return [stage for stage in hello.running_stages if stage.command != own]


def _describe(host: str, command: Command, num_stages: int, held_bytes: int, own: Command) -> str:
    """Return the line about ``command``, with its server's address if this machine can reach it."""
    stages = "1 stage" if num_stages == 1 else f"{num_stages} stages"
    is_here = command.host == own.host
    on_its_host = "" if is_here else f" on {command.host}"
    began = time.localtime(command.began_unix_s)
    is_today = began[:3] == time.localtime()[:3]
    since = time.strftime("%H:%M" if is_today else "%b %d %H:%M", began)
    hint = ""
    if command.address is not None and (is_here or not command.address.startswith(_LOOPBACK_STARTS)):
        hint = f"; --connect {command.address} uses its model"
    return (
        f"{host} also runs {stages} of another mlx-k2 command "
        f"(pid {command.pid}{on_its_host}, `{command.name}`, since {since}, {held_bytes / 1e9:.1f} GB){hint}"
    )
