"""The hosts, their memory, and the layers that each runs. Pure: starts nothing."""
