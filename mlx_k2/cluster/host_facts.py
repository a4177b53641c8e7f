"""The facts that a host reports about itself, as sent to the coordinator."""

from typing import Annotated

import msgspec


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One stage's files on its host. ``problem`` describes what is wrong with them, else None.

    ``missing_bytes`` are still to be fetched from the Hub; if 0 and without a problem, all files are there and their
    headers are checked. ``found`` and ``expected`` are SHA-256 checksums by file name: ``found`` is set on request,
    ``expected`` holds those that the Hub's cache on the host has.
    """

    folder: str
    num_files: int
    disk_free_bytes: int
    missing_bytes: int = 0
    problem: str | None = None
    found: dict[str, str] = {}
    expected: dict[str, str] = {}


class HostFacts(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Facts about one host: the answer to Probe.

    ``settings`` are the outputs of macOS's own tools by name; empty on other systems.
    """

    memory_free_bytes: int
    interfaces: dict[str, str]
    """The interface name of each IPv4 address whose interface is up."""
    backends: tuple[str, ...]
    """The backends of mlx.distributed that the host can use."""
    environment: dict[str, str]
    """The environment variables whose names begin with MLX_."""
    settings: dict[str, str] = {}
    model: ModelFacts | None = None


class Command(msgspec.Struct, frozen=True):
    """A running mlx-k2 command, or another program that starts stages: its own host, process id, name and start."""

    host: str
    pid: int
    name: str
    began_unix_s: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    """In seconds since 1970, within the range of datetime."""
    address: str | None = None
    """The URL of a server; None for other commands."""


class RunningStage(msgspec.Struct, frozen=True):
    """A stage that runs on a host, the command that started it, and the bytes of its shard and full cache."""

    command: Command
    held_bytes: int


class HopSpeed(msgspec.Struct, frozen=True):
    """Speed of one hop: the one-way time for a token's hidden states, and bytes per second for large messages."""

    latency_s: float
    bytes_per_s: float
