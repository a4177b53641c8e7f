"""Tests of HeldPorts: it reserves free ports, refuses ports in use, and releases all ports."""

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.errors import StageStartError
from mlx_k2.stage.ports import HeldPorts


def can_bind(address: str) -> bool:
    """Return whether a new socket can bind ``address``, as IP:PORT."""
    ip, _, port = address.partition(":")
    with socket.socket() as new_socket:
        try:
            new_socket.bind((ip, int(port)))
        except OSError:
            return False
    return True


@given(st.integers(0, 5))
@settings(max_examples=6)
def test_free_ports_are_reserved_and_released(count: int) -> None:
    held = HeldPorts(["127.0.0.1"] * count)
    assert len(set(held.addresses)) == count
    assert not any(can_bind(address) for address in held.addresses)
    held.release()
    assert all(can_bind(address) for address in held.addresses)


def test_an_explicit_port_is_held() -> None:
    released = HeldPorts(["127.0.0.1"])
    released.release()
    held = HeldPorts(released.addresses)
    assert held.addresses == released.addresses
    held.release()


def test_a_port_in_use_is_named_and_all_other_ports_are_released() -> None:
    in_use = HeldPorts(["127.0.0.1"])
    released = HeldPorts(["127.0.0.1"])
    released.release()
    with pytest.raises(StageStartError, match=rf"cannot listen on {in_use.addresses[0]}: .* port \d+ free"):
        HeldPorts([*released.addresses, *in_use.addresses])
    assert can_bind(released.addresses[0])
    in_use.release()


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(StageStartError, match=r"cannot listen on 192\.0\.2\.1: .*must be addresses of this host$"):
        HeldPorts(["192.0.2.1"])


def test_without_addresses_no_port_is_held() -> None:
    assert HeldPorts([]).addresses == ()


def test_a_port_in_time_wait_can_be_held_but_a_listening_port_cannot() -> None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as MLX's ring does
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ip, port = listener.getsockname()
        with socket.create_connection((ip, port)):
            listener.accept()[0].close()  # the side that closes first enters TIME_WAIT
        with pytest.raises(StageStartError, match="Address already in use"):
            HeldPorts([f"{ip}:{port}"])
    assert not can_bind(f"{ip}:{port}")
    held = HeldPorts([f"{ip}:{port}"])
    assert held.addresses == (f"{ip}:{port}",)
    held.release()
