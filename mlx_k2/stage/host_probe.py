"""Facts about this host for `mlx-k2 doctor`: memory, addresses, backends, settings and a stage's files."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import psutil

from mlx_k2.cluster.host_facts import HostFacts, ModelFacts
from mlx_k2.errors import MlxK2Error
from mlx_k2.private_files import home_folder
from mlx_k2.protocol.messages import Probe
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.inventory import shard_specs
from mlx_k2.weights.manifest import HubFile, identify, write_manifest
from mlx_k2.weights.model_files import files_to_fetch, locate_shard, read_model_files
from mlx_k2.weights.model_source import BUILTIN, is_repo, model_folder

BACKENDS = ("ring", "jaccl")
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "pmset": ("pmset", "-g"),
    "rdma_ctl": ("rdma_ctl", "status"),
    "ibv_devices": ("ibv_devices",),
    "bridge0": ("ifconfig", "bridge0"),
}
"""Commands of macOS that print settings, by the setting's name. The output of a command that fails is omitted."""
SETTING_TIMEOUT_S = 10.0


def probe(message: Probe, on_progress: Callable[[int, int], None]) -> HostFacts:
    """Return the facts about this host.

    ``on_progress`` is called with the bytes whose checksums are computed so far and the bytes in total.
    """
    return HostFacts(
        memory_free_bytes=psutil.virtual_memory().available,
        interfaces=_interfaces(),
        backends=tuple(name for name in BACKENDS if mx.distributed.is_available(name)),
        environment={name: value for name, value in os.environ.items() if name.startswith("MLX_")},
        settings=_settings() if sys.platform == "darwin" else {},
        model=_model_facts(message, on_progress),
    )


def _interfaces() -> dict[str, str]:
    """Return the name of the interface of each IPv4 address whose interface is up."""
    stats = psutil.net_if_stats()
    return {
        address.address: name
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family is socket.AF_INET and name in stats and stats[name].isup
    }


def _settings() -> dict[str, str]:
    outputs = {}
    for name, command in SETTINGS.items():
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=SETTING_TIMEOUT_S, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        outputs[name] = result.stdout
    return outputs


def _model_facts(message: Probe, on_progress: Callable[[int, int], None]) -> ModelFacts | None:
    """Return the facts about the requested layers' files, or the problem with them; None if no layers are requested."""
    if message.layers is None:
        return None
    try:
        return _facts_of_layers(message, message.layers, on_progress)
    except MlxK2Error as error:
        folder = home_folder() if is_repo(message.model) else model_folder(message.model)
        return ModelFacts(folder="", num_files=0, disk_free_bytes=_free_bytes(folder), problem=str(error))


def _facts_of_layers(message: Probe, layers: tuple[int, int], on_progress: Callable[[int, int], None]) -> ModelFacts:
    files, source = read_model_files(message.model)
    description = describe_model(files, source.path_or_repo)
    specs = shard_specs(description.config, *layers)
    missing = files_to_fetch(source, description.index, specs)
    if missing:
        return ModelFacts(
            folder="",
            num_files=len(description.index.files(specs)),
            disk_free_bytes=_free_bytes(home_folder()),
            missing_bytes=sum(missing.values()),
        )
    paths = sorted(set(locate_shard(source, description.index, specs, on_progress).values()))
    folder, recorded = paths[0].parent, identify(paths)
    expected = {path.name: checksum for path in paths if (checksum := recorded[path.name]) is not None}
    computed = _checksums(paths, on_progress) if message.deep else {}
    is_intact = computed.items() >= expected.items()
    # Without ``deep`` no checksum is computed and none written. The built-in model's folder belongs to the package.
    if is_intact and message.model.path_or_repo != BUILTIN:
        write_manifest(folder, {name: HubFile((folder / name).stat().st_size, computed[name]) for name in computed})
    return ModelFacts(
        folder=str(folder),
        num_files=len(paths),
        disk_free_bytes=_free_bytes(folder),
        found=computed,
        expected=expected,
    )


def _free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that has ``folder``, which may not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _checksums(paths: list[Path], on_progress: Callable[[int, int], None]) -> dict[str, str]:
    """Return the SHA-256 of each file, by file name."""
    total_bytes, done_bytes = sum(path.stat().st_size for path in paths), 0
    checksums = {}
    for path in paths:
        with path.open("rb") as file:
            checksums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        done_bytes += path.stat().st_size
        on_progress(done_bytes, total_bytes)
    return checksums
