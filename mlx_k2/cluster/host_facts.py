"""The facts that a host reports about itself, as sent to the coordinator."""

from typing import Annotated

import msgspec


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about one stage's files on its host."""

    folder: str
    num_files: int
    disk_free_bytes: int
    missing_bytes: int = 0
    """Bytes that are still to be fetched from the Hub. If 0 and without a problem, all files are there and usable."""
    problem: str | None = None
    """What is wrong with the files; None if nothing is."""
    found: dict[str, str] = {}
    """Computed SHA-256 checksums by file name, on request."""
    expected: dict[str, str] = {}
    """SHA-256 checksums by file name that the host has recorded: in the model's manifest or the Hub's cache."""


class HostFacts(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Facts about one host: the answer to Probe.

    ``settings`` are the outputs of macOS's own tools, by the names in stage/host_probe.py; empty on other systems.
    ``model`` None: the probe asked for no files.
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
    """A running mlx-k2 command, or another program that starts stages: its host, process id, name and start."""

    host: str
    pid: int
    name: str
    began_unix_s: Annotated[float, msgspec.Meta(ge=0, le=1e11)]
    """The time of its start, in seconds since 1970."""
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
