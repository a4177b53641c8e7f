"""Number of Hypothesis examples of a test that needs more than the default of 100."""

from hypothesis import settings


def at_least(count: int) -> int:
    """Return ``count``, or the selected profile's number of examples if that is larger, as with `make fuzz`."""
    return max(count, settings().max_examples)
