"""Slots: their owners, their cached tokens, and the choice of a slot for a new prompt. Knows no plans."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from mlx_k2.scheduling.sequence import Sequence, SharedPrefix

_BLOCK = 256
"""Number of tokens compared at a time."""


@dataclass(frozen=True)
class SlotChoice:
    """A free slot for a prompt, and the cached prefix of the prompt, which need not be computed."""

    slot: int
    shared: SharedPrefix


class SlotPool:
    """All slots. Free slots: the least recently used one first, each with the tokens that its cache still holds."""

    def __init__(self, num_slots: int) -> None:
        self._free: dict[int, tuple[int, ...]] = dict.fromkeys(range(num_slots), ())
        self._owners: dict[int, Sequence] = {}

    @property
    def num_free(self) -> int:
        """Number of free slots."""
        return len(self._free)

    def choose(self, prompt_ids: tuple[int, ...]) -> SlotChoice:
        """Return a free slot for a prompt, and the prefix that it shares with a cache.

        The longest cached prefix is used in place if its slot is free and the prefix is at least half of what the slot
        holds, or if the slot is the least recently used one. Otherwise the prefix is copied to the least recently used
        free slot. The prompt's last token is never shared: the token after it must be computed.
        """
        assert self._free, "no slot is free"
        oldest = next(iter(self._free))
        longest = len(prompt_ids) - 1
        held = {**self._free, **{slot: owner.cached_ids for slot, owner in self._owners.items()}}
        shared = {slot: min(longest, common_prefix(token_ids, prompt_ids)) for slot, token_ids in held.items()}
        source = max(shared, key=lambda slot: (shared[slot], slot == oldest, slot in self._free))
        if shared[source] == 0:
            return SlotChoice(oldest, SharedPrefix())
        if source in self._free and (source == oldest or 2 * shared[source] >= len(self._free[source])):
            return SlotChoice(source, SharedPrefix(shared[source]))
        return SlotChoice(oldest, SharedPrefix(shared[source], source))

    def acquire(self, slot: int, owner: Sequence) -> None:
        """Assign a free slot to a sequence."""
        del self._free[slot]
        self._owners[slot] = owner

    def release(self, slot: int) -> None:
        """Free a slot. Its owner's cached tokens stay in it until another sequence acquires it."""
        owner = self._owners.pop(slot)
        self._free[slot] = tuple(owner.cached_ids)

    def forget(self) -> None:
        """Mark the caches of all free slots as empty."""
        self._free = dict.fromkeys(self._free, ())


def common_prefix(left: Tokens[int], right: Tokens[int]) -> int:
    """Return the length of the longest common prefix."""
    most = min(len(left), len(right))
    for start in range(0, most, _BLOCK):
        end = min(start + _BLOCK, most)
        if tuple(left[start:end]) != tuple(right[start:end]):
            return next(index for index in range(start, end) if left[index] != right[index])
    return most
