"""Numbers of Hypothesis examples of tests that need more than the default of 100, or fewer."""

from hypothesis import settings


def at_least(count: int) -> int:
    """Return ``count``, or the selected profile's number of examples if that is larger, as with `make fuzz`."""
    return max(count, settings().max_examples)


def scaled(count: int) -> int:
    """Return ``count`` examples, scaled by the ratio of the selected profile's examples to the default of 100."""
    return count * settings().max_examples // 100
