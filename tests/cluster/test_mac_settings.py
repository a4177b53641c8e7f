"""Tests of the parsers for the output of macOS's tools."""

from mlx_k2.cluster.mac_settings import (
    bridge_is_active,
    macos_version,
    rdma_devices,
    rdma_is_enabled,
    sleeps_after_minutes,
)

PMSET = """\
System-wide power settings:
Currently in use:
 lidwake              1
 standbydelaylow      10800
 standby              1
 ttyskeepawake        1
 hibernatemode        3
 hibernatefile        /var/vm/sleepimage
 displaysleep         28
 sleep                1 (sleep prevented by sharingd)
 tcpkeepalive         1
 disksleep            0
"""

# Output of ibv_devices on Macs with Thunderbolt 4, which have no device, from ml-explore/mlx#3777 and jundot/omlx#3037.
NO_DEVICES = """\
device              node GUID
------          ----------------
"""
DEVICES = """\
    device                 node GUID
    ------              ----------------
    rdma_en2            8096a9d9edbaac05
    rdma_en5            8196a9d9edbaac05
"""
BRIDGE = """\
bridge0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\toptions=63<RXCSUM,TXCSUM,TSO4,TSO6>
\tether 36:6c:58:a1:00:40
\tmember: en2 flags=3<LEARNING,DISCOVER>
\tmedia: <unknown type>
\tstatus: {status}
"""


def test_the_idle_sleep_setting_is_read_even_while_a_process_prevents_sleep() -> None:
    assert sleeps_after_minutes(PMSET) == 1
    assert sleeps_after_minutes(PMSET.replace("1 (sleep prevented by sharingd)", "0")) == 0
    assert sleeps_after_minutes("") is None
    assert sleeps_after_minutes(" displaysleep         28\n disksleep            10\n") is None


def test_the_state_and_the_devices_of_rdma_are_read() -> None:
    assert rdma_is_enabled("enabled\n") and not rdma_is_enabled("disabled\n") and not rdma_is_enabled("")
    assert rdma_devices(DEVICES) == ("rdma_en2", "rdma_en5")
    assert rdma_devices(NO_DEVICES) == rdma_devices("") == ()


def test_the_state_of_the_thunderbolt_bridge_is_read() -> None:
    assert bridge_is_active(BRIDGE.format(status="active"))
    assert not bridge_is_active(BRIDGE.format(status="inactive")) and not bridge_is_active("")


def test_macos_versions_are_numbers_in_order_and_none_on_other_systems() -> None:
    assert macos_version("macOS 26.2") == (26, 2) < macos_version("macOS 26.10.1")  # type: ignore[operator]
    assert macos_version("Linux-6.1-x86_64-with-glibc2.36") is None
