"""Parsers of the output of macOS's own tools. They run none of the tools."""

import re


def sleeps_after_minutes(pmset: str) -> int | None:
    """Return from `pmset -g` the idle minutes until the Mac sleeps: 0 for never, None if the output has no number.

    A program that prevents sleep at the moment does not change the number, because its effect ends with the program.
    """
    found = re.search(r"^\s*sleep\s+(\d+)", pmset, re.MULTILINE)
    return int(found[1]) if found else None


def rdma_is_enabled(rdma_ctl: str) -> bool:
    """Return from `rdma_ctl status` whether RDMA is enabled."""
    return "enabled" in rdma_ctl.split()


def rdma_devices(ibv_devices: str) -> tuple[str, ...]:
    """Return from `ibv_devices` the devices' names. A Mac without Thunderbolt 5 has none, even if RDMA is enabled."""
    return tuple(re.findall(r"^\s*(rdma_\S+)\s+[0-9a-f:]+\s*$", ibv_devices, re.MULTILINE))


def bridge_is_active(ifconfig: str) -> bool:
    """Return from `ifconfig bridge0` whether the Thunderbolt bridge uses the cables."""
    return re.search(r"^\s*status: active", ifconfig, re.MULTILINE) is not None


def macos_version(system: str) -> tuple[int, ...] | None:
    """Return the version numbers in ``Hello.system``, as in 'macOS 26.2'; None for other systems."""
    found = re.fullmatch(r"macOS (\d+(?:\.\d+)*)", system)
    return tuple(int(part) for part in found[1].split(".")) if found else None
