"""Slots: their owners, their cached tokens, and the choice of a slot for a new prompt. Knows no plans."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from mlx_k2.scheduling.drafter import NgramDrafter
from mlx_k2.scheduling.sequence import Sequence, SharedPrefix

_BLOCK = 256
"""Number of tokens compared first; each further comparison has four times as many."""
_COPY_COST = 0.001
"""Cost of copying a cached position to another slot, relative to computing it. Computed for Kimi K2 on an M3 Ultra: a
position is 70 kB, copied at 400 GB/s in 0.35 us, and takes some milliseconds to compute."""


@dataclass(frozen=True)
class SlotChoice:
    """A free slot for a prompt, and the cached prefix of the prompt, which need not be computed."""

    slot: int
    shared: SharedPrefix
    num_lost: int = 0
    """The cached tokens that are overwritten and that no other slot holds."""


@dataclass
class _FreeSlot:
    """The tokens that a free slot's cache holds, their drafter, and the time of release."""

    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    drafter: NgramDrafter = field(default_factory=NgramDrafter)
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

    def choose(self, prompt_ids: "array[int]", *, ages: bool = True) -> SlotChoice:
        """Return the free slot whose overwriting costs least, and the longest cached prefix of the prompt.

        The cost of a slot is the number of cached tokens that would be lost, divided by 1 + the slot's age: the longer
        a slot was not used, the less likely its tokens are needed again. Without ``ages`` it is only that number: then
        no number of short prompts overwrites a long conversation while a slot holds less. Tokens that another slot
        holds too are not lost, nor is the prefix that the prompt uses in place. Taking the prefix from another slot
        adds the cost of a copy. The prompt's last token is never shared: the token after it must be computed.
        """
        assert self._free, "no slot is free"
        held = {slot: free.token_ids for slot, free in self._free.items()}
        held |= {slot: owner.cached_ids for slot, owner in self._owners.items()}
        longest = len(prompt_ids) - 1
        shared = {slot: min(longest, common_prefix(token_ids, prompt_ids)) for slot, token_ids in held.items()}
        source = max(shared, key=lambda slot: (shared[slot], slot in self._free))
        elsewhere = _held_elsewhere(held)

        def num_lost(slot: int) -> int:
            return max(0, len(held[slot]) - max(elsewhere[slot], shared[source] if slot == source else 0))

        def cost(slot: int) -> float:
            age = self._now - self._free[slot].released_at if ages else 0
            return num_lost(slot) / (1 + age) + (0.0 if slot == source else _COPY_COST * shared[source])

        slot = min(self._free, key=lambda slot: (cost(slot), self._free[slot].released_at, slot != source))
        if not shared[source]:
            return SlotChoice(slot, SharedPrefix(), num_lost(slot))
        return SlotChoice(slot, SharedPrefix(shared[source], None if slot == source else source), num_lost(slot))

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
        self._free[slot] = _FreeSlot(owner.cached_ids, owner.drafter, self._now)

    def forget(self) -> None:
        """Mark the caches of all free slots as empty."""
        self._free = {slot: _FreeSlot(released_at=free.released_at) for slot, free in self._free.items()}


def _held_elsewhere(held: Mapping[int, "array[int]"]) -> dict[int, int]:
    """Return for each slot the length of its longest prefix that another slot holds too.

    In lexicographic order the longest common prefix is always one with a neighbour.
    """
    elsewhere = dict.fromkeys(held, 0)
    for one, other in pairwise(sorted(held, key=lambda slot: held[slot])):
        length = common_prefix(held[one], held[other])
        elsewhere[one] = max(elsewhere[one], length)
        elsewhere[other] = max(elsewhere[other], length)
    return elsewhere


def common_prefix(left: "array[int]", right: "array[int]") -> int:
    """Return the length of the longest common prefix."""
    most = min(len(left), len(right))
    start, size = 0, _BLOCK
    while start < most and left[start : start + size] == right[start : start + size]:
        start, size = start + size, 4 * size
    while size > 1:  # the first difference is among the next ``size`` tokens
        size //= 2
        if left[start : start + size] == right[start : start + size]:
            start += size
    return min(start, most)
