"""Who owns which slot, what each slot's cache holds, and where a new prompt finds its beginning. Knows no plans."""

from collections.abc import Sequence as Tokens
from dataclasses import dataclass

from mlx_k2.scheduling.sequence import Sequence, SharedPrefix

_BLOCK = 256
"""Tokens compared at a time."""


@dataclass(frozen=True)
class SlotChoice:
    """A free slot for a prompt, and what of the prompt need not be computed."""

    slot: int
    shared: SharedPrefix


class SlotPool:
    """All slots: free ones in the order in which they were last used, each with the tokens that it still holds."""

    def __init__(self, num_slots: int) -> None:
        self._free: dict[int, tuple[int, ...]] = dict.fromkeys(range(num_slots), ())
        self._owners: dict[int, Sequence] = {}

    @property
    def num_free(self) -> int:
        """How many sequences can still start."""
        return len(self._free)

    def choose(self, prompt_ids: tuple[int, ...]) -> SlotChoice:
        """Where a prompt should run.

        The longest cached beginning is taken over with its slot when that slot holds little else; otherwise, and from
        a running sequence, it is copied to the slot that was not used for longest. The prompt's last token is never
        shared: what follows it must be computed.
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
        """Give a free slot to a sequence."""
        del self._free[slot]
        self._owners[slot] = owner

    def release(self, slot: int) -> None:
        """Free a slot; it keeps what its owner left in the cache until somebody needs it."""
        owner = self._owners.pop(slot)
        self._free[slot] = tuple(owner.cached_ids)

    def forget(self) -> None:
        """No cache holds anything any more."""
        self._free = dict.fromkeys(self._free, ())


def common_prefix(left: Tokens[int], right: Tokens[int]) -> int:
    """How many tokens two sequences begin with alike."""
    most = min(len(left), len(right))
    for start in range(0, most, _BLOCK):
        end = min(start + _BLOCK, most)
        if tuple(left[start:end]) != tuple(right[start:end]):
            return next(index for index in range(start, end) if left[index] != right[index])
    return most
