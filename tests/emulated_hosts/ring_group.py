"""A group of stages over ssh that run the program ``ring`` of stage_programs.py, and a coordinator of such a group.

As a program: ring_group.py SITUATION PYTHON LEASE_S HOST=ADDRESS... brings the stages into the situation, writes
"ready" to stdout, and runs until it is killed.
"""

import sys
from collections.abc import Mapping, Sequence

from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.stage_events import StageMessage
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.protocol.messages import Connect, Connected, FromStage, Prepare, Prepared, RingLinks, Step
from mlx_k2.weights.model_source import ModelSource

RING_PORT = 34567


def start_ring_group(hosts: Sequence[str], python: str, lease_s: float) -> StageGroup:
    """Return a group of one stage on each host. Its log goes to stderr."""
    locations = [StageLocation(ssh=host, python=python) for host in hosts]
    return StageGroup(locations, lease_s, _log)


def _log(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def prepare(group: StageGroup) -> None:
    """Send each stage its rank and wait until all have answered."""
    for rank in range(group.size):
        group.send(rank, Prepare(rank, num_stages=group.size, model=ModelSource(path_or_repo=""), listen=()))
    for _ in range(group.size):
        receive(group, Prepared)


def connect(group: StageGroup, addresses: Sequence[str], ranks: Sequence[int]) -> None:
    """Let ``ranks`` join the ring of all addresses. Do not wait until they have joined."""
    links = RingLinks(tuple((f"{address}:{RING_PORT}",) for address in addresses))
    for rank in ranks:
        group.send(rank, Connect(links, to_next=None, from_previous=None))


def receive(group: StageGroup, kind: type[FromStage]) -> FromStage:
    """Return the next message, which must be of type ``kind``."""
    event = group.receive(timeout_s=30)
    assert isinstance(event, StageMessage) and isinstance(event.message, kind), event
    return event.message


def enter_situation(situation: str, group: StageGroup, addresses: Sequence[str]) -> None:
    """Bring the stages into a situation.

    ``idle``: all are connected. ``init``: ranks 0 and 1 wait for rank 2 in mlx.distributed.init. ``recv``: rank 1 waits
    for the hidden states of rank 0.
    """
    prepare(group)
    if situation == "init":
        connect(group, addresses, ranks=[0, 1])
        return
    connect(group, addresses, ranks=range(group.size))
    for _ in range(group.size):
        receive(group, Connected)
    if situation == "recv":
        group.send(1, Step(number=1, rows=()))


def main(situation: str, python: str, lease_s: float, hosts: Mapping[str, str]) -> None:
    """Run the coordinator. ``hosts`` maps names to addresses."""
    with start_ring_group(tuple(hosts), python, lease_s) as group:
        enter_situation(situation, group, tuple(hosts.values()))
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            group.receive(timeout_s=60)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), dict(word.split("=") for word in sys.argv[4:]))
