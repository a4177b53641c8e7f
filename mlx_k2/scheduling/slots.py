"""Slots: their owners, their cached tokens, and the choice of a slot for a new prompt. Knows no plans."""

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from mlx_k2.scheduling.drafter import NgramDrafter
from mlx_k2.scheduling.sequence import Sequence, SharedPrefix

_FIRST_BLOCK_TOKENS = 256
"""Number of tokens in the first block that is compared; each further block has four times as many."""
_COPY_COST = 0.001
"""Cost of copying a cached position to another slot, relative to computing it. Calculated for Kimi K2 on an M3 Ultra: a
position is 70 kB, copied at 400 GB/s in 0.35 us, and takes some milliseconds to compute."""


@dataclass(frozen=True)
class SlotChoice:
    """A free slot for a prompt, and the prefix of the prompt that is cached already."""

    slot: int
    shared: SharedPrefix
    num_lost: int = 0
    """Number of cached tokens that the prompt overwrites and that no other slot holds."""


@dataclass
class _FreeSlot:
    """The tokens that a free slot's cache holds, their drafter, and how many slots were acquired before its release."""

    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    drafter: NgramDrafter = field(default_factory=NgramDrafter)
    released_at: int = 0


class SlotPool:
    """All slots. A free slot's age is the number of slots that were acquired since its release."""

    def __init__(self, num_slots: int) -> None:
        self._free = {slot: _FreeSlot() for slot in range(num_slots)}
        self._owners: dict[int, Sequence] = {}
        self._num_acquired = 0

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def choose(self, prompt_ids: "array[int]", *, use_ages: bool = True) -> SlotChoice:
        """Return the free slot whose overwriting costs least, and the longest cached prefix of the prompt.

        The cost of a slot is the number of cached tokens that would be lost, divided by 1 + the slot's age: the longer
        a slot was not used, the less likely its tokens are needed again. Without ``use_ages`` the cost is only that
        number: then no number of short prompts overwrites a long conversation while a slot holds less. Tokens that
        another slot holds too are not lost, nor is the prefix that the prompt uses in place. Copying the prefix from
        another slot adds its own cost. The prompt's last token is never shared: the token after it must be computed.
        """
        assert self._free, "no slot is free"
        cached_ids = {slot: free.token_ids for slot, free in self._free.items()}
        cached_ids |= {slot: owner.cached_ids for slot, owner in self._owners.items()}
        longest_prefix = prompt_ids[:-1]
        lengths = {slot: common_prefix(token_ids, longest_prefix) for slot, token_ids in cached_ids.items()}
        source = max(lengths, key=lambda slot: (lengths[slot], slot in self._free))
        num_shared = lengths[source]
        num_kept = _lengths_held_elsewhere(cached_ids)  # tokens of each slot that are not lost if it is overwritten
        num_kept[source] = max(num_kept[source], num_shared)

        def num_lost(slot: int) -> int:
            return len(cached_ids[slot]) - num_kept[slot]

        def cost(slot: int) -> float:
            age = self._num_acquired - self._free[slot].released_at if use_ages else 0
            copy_cost = 0.0 if slot == source else _COPY_COST * num_shared
            return num_lost(slot) / (1 + age) + copy_cost

        slot = min(self._free, key=lambda slot: (cost(slot), self._free[slot].released_at, slot != source))
        copy_from = source if num_shared and slot != source else None
        return SlotChoice(slot, SharedPrefix(num_shared, copy_from), num_lost(slot))

    def acquire(self, choice: SlotChoice, owner: Sequence) -> None:
        """Start ``owner`` in a free slot. A prefix that is used in place keeps its drafter's index."""
        free = self._free.pop(choice.slot)
        self._owners[choice.slot] = owner
        self._num_acquired += 1
        is_reused = choice.shared.num_tokens > 0 and choice.shared.copy_from is None
        drafter = free.drafter if is_reused else NgramDrafter()
        drafter.truncate(choice.shared.num_tokens)
        owner.start(choice.slot, choice.shared, drafter)

    def release(self, slot: int) -> None:
        """Free a slot. Its owner's cached tokens stay in it until another sequence acquires it."""
        owner = self._owners.pop(slot)
        self._free[slot] = _FreeSlot(owner.cached_ids, owner.drafter, self._num_acquired)

    def clear_caches(self) -> None:
        """Mark the caches of all free slots as empty."""
        self._free = {slot: _FreeSlot(released_at=free.released_at) for slot, free in self._free.items()}


def _lengths_held_elsewhere(cached_ids: Mapping[int, "array[int]"]) -> dict[int, int]:
    """Return for each slot the length of its longest prefix that another slot holds too.

    In lexicographic order of their tokens, a slot has its longest common prefix with one of its neighbours.
    """
    lengths = dict.fromkeys(cached_ids, 0)
    for left, right in pairwise(sorted(cached_ids, key=lambda slot: cached_ids[slot])):
        length = common_prefix(cached_ids[left], cached_ids[right])
        lengths[left] = max(lengths[left], length)
        lengths[right] = max(lengths[right], length)
    return lengths


def common_prefix(left: "array[int]", right: "array[int]") -> int:
    """Return the length of the longest common prefix. Compare blocks, which is faster than single tokens."""
    shorter = min(len(left), len(right))
    start, size = 0, _FIRST_BLOCK_TOKENS
    while start < shorter and left[start : start + size] == right[start : start + size]:
        start, size = start + size, 4 * size
    while size > 1:  # the first difference is among the next ``size`` tokens
        size //= 2
        if left[start : start + size] == right[start : start + size]:
            start += size
    return min(start, shorter)
