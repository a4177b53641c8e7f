"""Reads what macOS's own tools print. Runs none of them."""

import re


def sleeps_after_minutes(pmset: str) -> int | None:
    """From `pmset -g`: after how many idle minutes the Mac sleeps, 0 for never; None where it does not say.

    The number stands although something prevents sleep just now: that ends with whatever prevents it.
    """
    found = re.search(r"^\s*sleep\s+(\d+)", pmset, re.MULTILINE)
    return int(found[1]) if found else None


def rdma_is_enabled(rdma_ctl: str) -> bool:
    """From `rdma_ctl status`."""
    return "enabled" in rdma_ctl.split()


def rdma_devices(ibv_devices: str) -> tuple[str, ...]:
    """From `ibv_devices`: the devices' names. A Mac without Thunderbolt 5 has none, also where RDMA is enabled."""
    return tuple(re.findall(r"^\s*(rdma_\S+)\s+[0-9a-f:]+\s*$", ibv_devices, re.MULTILINE))


def bridge_is_active(ifconfig: str) -> bool:
    """From `ifconfig bridge0`: whether the Thunderbolt bridge holds the cables."""
    return re.search(r"^\s*status: active", ifconfig, re.MULTILINE) is not None


def macos_version(system: str) -> tuple[int, ...] | None:
    """From a stage's Hello, as in 'macOS 26.2'; None for other systems."""
    found = re.fullmatch(r"macOS (\d+(?:\.\d+)*)", system)
    return tuple(int(part) for part in found[1].split(".")) if found else None
