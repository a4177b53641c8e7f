"""Tests of address_choices: the addresses by which each host can reach its neighbours."""

import pytest

from mlx_k2.doctor.addresses import address_choices

LOOPBACK = {"127.0.0.1": "lo0"}


@pytest.mark.parametrize(
    ("interfaces", "choices"),
    [
        (
            [{"192.168.1.5": "en0", "10.0.0.1": "en5"}, {"192.168.1.9": "en0", "10.0.0.2": "en5"}],
            [("10.0.0.1", "10.0.0.2"), ("192.168.1.5", "192.168.1.9")],
        ),
        (
            [{"169.254.7.1": "bridge0", "192.168.1.5": "en0"}, {"169.254.200.3": "bridge0", "192.168.1.9": "en0"}],
            [("192.168.1.5", "192.168.1.9"), ("169.254.7.1", "169.254.200.3")],
        ),
        ([{"192.168.1.5": "en0"}, {"192.168.2.9": "en0"}], []),
        (
            [
                {"10.0.1.1": "en5", "10.0.3.2": "en6"},
                {"10.0.1.2": "en5", "10.0.2.1": "en6"},
                {"10.0.2.2": "en5", "10.0.3.1": "en6"},
            ],
            [("10.0.3.2", "10.0.1.2", "10.0.2.2")],
        ),
    ],
    ids=["two networks", "link-local last", "no network", "cables between neighbours"],
)
def test_the_chosen_addresses_are_in_one_network_or_on_cables_between_neighbours(
    interfaces: list[dict[str, str]], choices: list[tuple[str, ...]]
) -> None:
    assert address_choices([LOOPBACK | host for host in interfaces]) == choices
