"""The messages between coordinator, guard and stage, their framing, and the threads that read and write frames."""
