"""The messages between coordinator and stage, their framing, and the two ends of the pipe."""
