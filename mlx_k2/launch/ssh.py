"""The ssh command line, and the meaning of ssh's failures. Knows nothing of stages or frames."""

CONNECT_TIMEOUT_S = 10
SSH_EXIT_CODE = 255
"""The exit code of ssh's own failures; any other exit code is the remote command's."""

_OPTIONS = {
    "BatchMode": "yes",  # never prompt: there may be no terminal, and several clients start at once
    "ConnectTimeout": str(CONNECT_TIMEOUT_S),
    "ServerAliveInterval": "2",
    "ServerAliveCountMax": "3",
    "ControlMaster": "no",  # a shared connection could outlive this client, or end before it
    "ControlPath": "none",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "RemoteCommand": "none",
    "PermitLocalCommand": "no",
    "LogLevel": "ERROR",
}

# Texts in ssh's stderr, and their meaning with the command that fixes it. The first match counts.
_FAILURES = (
    (
        ("REMOTE HOST IDENTIFICATION HAS CHANGED", "has changed and you have requested strict checking"),
        "its host key is not the one that ssh knows: if the machine was set up anew, forget the old key with "
        "`ssh-keygen -R {host}`, then run `ssh {host}` once and compare the new one",
    ),
    (
        ("Host key verification failed", "host key is known"),
        "ssh does not know its host key: run `ssh {host}` once and accept it, "
        "or `ssh-keyscan {host} >> ~/.ssh/known_hosts`",
    ),
    (
        ("Permission denied", "Too many authentication failures"),
        "it refused this user's key: run `ssh-copy-id {host}`, then see that `ssh {host} true` asks for no password",
    ),
    (
        ("Could not resolve hostname",),
        "its name cannot be resolved: check its spelling in the hostfile (a Mac may answer to `{host}.local`), "
        "or give it a HostName in ~/.ssh/config",
    ),
    (
        ("Connection refused",),
        "it accepts no ssh connections: switch on Remote Login in its sharing settings, "
        "or run `sudo systemsetup -setremotelogin on` on it",
    ),
    (
        ("timed out", "No route to host", "Network is unreachable", "Host is down"),
        "it cannot be reached: see that it is switched on, awake and on this network with `ping {host}`",
    ),
)


def ssh_command(host: str, remote_command: str) -> tuple[str, ...]:
    """Return the command that runs ``remote_command`` on ``host`` by the system's ssh with the user's configuration."""
    options = [word for name, value in _OPTIONS.items() for word in ("-o", f"{name}={value}")]
    return ("ssh", "-T", *options, "--", host, remote_command)


def explain_ssh_failure(host: str, stderr: str) -> str:
    """Explain why ssh could not connect to ``host``, with the command that fixes it."""
    for signs, meaning in _FAILURES:
        if any(sign in stderr for sign in signs):
            return meaning.format(host=host)
    lines = stderr.strip().splitlines()
    return f"ssh failed: {lines[-1] if lines else 'it did not say why'}; try `ssh {host} true`"
