"""What a host finds out about itself when it is examined, as it travels to the command that judges it."""

import msgspec


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One stage's files on its host. ``problem`` says what is wrong with them; None: all are there, headers checked.

    ``missing_bytes`` are to be fetched from the Hub yet. Checksums (SHA-256) are computed where they were asked for:
    ``found`` by file name, and ``expected`` as far as the Hub's cache knows them.
    """

    folder: str
    num_files: int
    disk_free_bytes: int
    missing_bytes: int = 0
    problem: str | None = None
    found: dict[str, str] = {}
    expected: dict[str, str] = {}


class HostFacts(msgspec.Struct, frozen=True, kw_only=True):
    """One host: ``settings`` are the outputs of macOS's own tools by name, empty elsewhere."""

    memory_free_bytes: int
    interfaces: dict[str, str]
    """The interface of each IPv4 address that is up."""
    backends: tuple[str, ...]
    """Those of mlx.distributed that can be used here."""
    environment: dict[str, str]
    """What begins with MLX_."""
    settings: dict[str, str] = {}
    model: ModelFacts | None = None


class HopSpeed(msgspec.Struct, frozen=True):
    """From one stage to the next: one way's time for a token's hidden states, and bytes a second for large messages."""

    latency_s: float
    bytes_per_s: float
