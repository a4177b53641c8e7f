"""Which hosts there are, what they hold, and which layers each runs. Pure: starts nothing."""
