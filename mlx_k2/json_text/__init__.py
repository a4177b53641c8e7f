"""Reading of JSON from outside: files of users and of checkpoints, arguments of tool calls, requests."""
