"""The checked options of `mlx-k2 serve`. Starts nothing."""

from pathlib import Path
from typing import Literal

import click
import msgspec

from mlx_k2.deployment.cluster_options import ClusterOptions
from mlx_k2.scheduling.drafter import DraftMode


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mlx-k2 serve`."""

    cluster: ClusterOptions
    host: str
    port: int
    allowed_hosts: tuple[str, ...]
    allowed_origins: tuple[str, ...]
    api_keys_path: str | None
    certificate_path: str | None
    certificate_key_path: str | None
    max_sequences: int
    max_queued: int
    drain_s: float
    keepalive: Literal["comment", "chunk", "off"]
    strict_model: bool
    mirror_reasoning: bool
    draft_mode: DraftMode
    tool_grammar: bool
    print_settings: str | None
    launchd: bool
    log_dir: Path | None
    log_tokens: bool
    verbose: bool

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if self.port == 0 and (self.print_settings is not None or self.launchd):
            raise click.UsageError("clients must know the port: give --port")
        if self.certificate_key_path is not None and self.certificate_path is None:
            raise click.UsageError("--keyfile is the private key of a certificate: add --certfile")
