"""Slots: their owners, their cached tokens, and the choice of a slot for a new prompt. Knows no plans."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field

from mlx_k2.scheduling.drafter import Drafter, NgramDrafter
from mlx_k2.scheduling.sequence import Sequence, SharedPrefix

_BLOCK = 256
"""Number of tokens compared at a time."""
_COPY_COST = 0.001
"""Cost of copying a cached position to another slot, relative to computing it. Computed for Kimi K2 on an M3 Ultra: a
position is 70 kB, copied at 400 GB/s in 0.35 us, and takes some milliseconds to compute."""


@dataclass(frozen=True)
class SlotChoice:
    """A free slot for a prompt, and the cached prefix of the prompt, which need not be computed."""

    slot: int
    shared: SharedPrefix


@dataclass
class _FreeSlot:
    """The tokens that a free slot's cache holds, their drafter, and the time of release."""

    token_ids: tuple[int, ...] = ()
    drafter: Drafter = field(default_factory=NgramDrafter)
    released_at: int = 0


class SlotPool:
    """All slots. Time is counted in acquired slots."""

    def __init__(self, num_slots: int) -> None:
        self._free = {slot: _FreeSlot() for slot in range(num_slots)}
        self._owners: dict[int, Sequence] = {}
        self._now = 0

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def choose(self, prompt_ids: tuple[int, ...]) -> SlotChoice:
        """Return the free slot whose overwriting costs least, and the longest cached prefix of the prompt.

        The cost of a slot is the number of cached tokens that would be lost, divided by 1 + the slot's age: the longer
        a slot was not used, the less likely its tokens are needed again. Tokens that another slot holds too are not
        lost, nor is the prefix that the prompt uses in place. Taking the prefix from another slot adds the cost of a
        copy. The prompt's last token is never shared: the token after it must be computed.
        """
        assert self._free, "no slot is free"
        held: dict[int, Tokens[int]] = {slot: free.token_ids for slot, free in self._free.items()}
        held |= {slot: owner.cached_ids for slot, owner in self._owners.items()}
        longest = len(prompt_ids) - 1
        shared = {slot: min(longest, common_prefix(token_ids, prompt_ids)) for slot, token_ids in held.items()}
        source = max(shared, key=lambda slot: (shared[slot], slot in self._free))

        def cost(slot: int) -> float:
            reused = shared[source] if slot == source else 0
            copied = 0 if slot == source else shared[source]
            return self._loss(slot, held, reused) + _COPY_COST * copied

        slot = min(self._free, key=lambda slot: (cost(slot), self._free[slot].released_at, slot != source))
        if not shared[source]:
            return SlotChoice(slot, SharedPrefix())
        return SlotChoice(slot, SharedPrefix(shared[source], None if slot == source else source))

    def acquire(self, choice: SlotChoice, owner: Sequence) -> None:
        """Start a sequence in a free slot. A prefix that is used in place keeps its drafter's index."""
        free = self._free.pop(choice.slot)
        self._owners[choice.slot] = owner
        self._now += 1
        is_reused = choice.shared.num_tokens > 0 and choice.shared.copy_from is None
        drafter = free.drafter if is_reused else NgramDrafter()
        drafter.truncate(choice.shared.num_tokens)
        owner.start(choice.slot, choice.shared, drafter)

    def release(self, slot: int) -> None:
        """Free a slot. Its owner's cached tokens stay in it until another sequence acquires it."""
        owner = self._owners.pop(slot)
        self._free[slot] = _FreeSlot(tuple(owner.cached_ids), owner.drafter, self._now)

    def forget(self) -> None:
        """Mark the caches of all free slots as empty."""
        self._free = {slot: _FreeSlot(released_at=free.released_at) for slot, free in self._free.items()}

    def _loss(self, slot: int, held: dict[int, Tokens[int]], reused: int) -> float:
        """Return the number of tokens lost with a free slot, less the more acquisitions ago it was released."""
        token_ids = self._free[slot].token_ids
        if len(token_ids) <= reused:
            return 0.0
        elsewhere = max((common_prefix(token_ids, other) for key, other in held.items() if key != slot), default=0)
        return (len(token_ids) - max(reused, elsewhere)) / (1 + self._now - self._free[slot].released_at)


def common_prefix(left: Tokens[int], right: Tokens[int]) -> int:
    """Return the length of the longest common prefix."""
    most = min(len(left), len(right))
    for start in range(0, most, _BLOCK):
        end = min(start + _BLOCK, most)
        if tuple(left[start:end]) != tuple(right[start:end]):
            return next(index for index in range(start, end) if left[index] != right[index])
    return most
