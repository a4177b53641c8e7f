"""Facts about this host for `mlx-k2 doctor`: memory, addresses, backends, settings, a stage's files. Evaluates none."""

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
"""Commands of macOS by setting name. The setting of a command that fails is omitted."""
SETTING_S = 10.0


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
            done = subprocess.run(command, capture_output=True, text=True, timeout=SETTING_S, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        outputs[name] = done.stdout
    return outputs


def _model_facts(message: Probe, on_progress: Callable[[int, int], None]) -> ModelFacts | None:
    """Return the facts about the requested layers' files. Missing and faulty files are facts, not errors."""
    if message.layers is None:
        return None
    first_layer, end_layer = message.layers
    try:
        files, source = read_model_files(message.model)
        description = describe_model(files, source.path_or_repo)
        specs = shard_specs(description.config, first_layer, end_layer)
        missing = files_to_fetch(source, description.index, specs)
        if missing:
            num_files = len(description.index.files(specs))
            free_bytes = shutil.disk_usage(_existing(home_folder())).free
            return ModelFacts(
                folder="", num_files=num_files, disk_free_bytes=free_bytes, missing_bytes=sum(missing.values())
            )
        paths = sorted(set(locate_shard(source, description.index, specs, on_progress).values()))
        known = identify(paths)
    except MlxK2Error as error:
        folder = _existing(model_folder(message.model) if not is_repo(message.model) else home_folder())
        free_bytes = shutil.disk_usage(folder).free
        return ModelFacts(folder="", num_files=0, disk_free_bytes=free_bytes, problem=str(error))
    expected = {path.name: digest for path in paths if (digest := known[path.name]) is not None}
    found = _checksums(paths, on_progress) if message.deep else {}
    if found.items() >= expected.items() and message.model.path_or_repo != BUILTIN:
        sums = {path.name: HubFile(path.stat().st_size, found[path.name]) for path in paths if path.name in found}
        write_manifest(paths[0].parent, sums)
    return ModelFacts(
        folder=str(paths[0].parent),
        num_files=len(paths),
        disk_free_bytes=shutil.disk_usage(paths[0].parent).free,
        found=found,
        expected=expected,
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _checksums(paths: list[Path], on_progress: Callable[[int, int], None]) -> dict[str, str]:
    total, done = sum(path.stat().st_size for path in paths), 0
    digests = {}
    for path in paths:
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        done += path.stat().st_size
        on_progress(done, total)
    return digests
