"""The messages between coordinator, guard and stage, their framing, and the two ends of the pipe."""
