"""Reading of JSON that others wrote: files of users and of checkpoints, arguments of tool calls, messages."""
