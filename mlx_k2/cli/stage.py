"""`mlx-k2 stage`: the internal command that ssh starts on a host whose Python is not at the coordinator's path."""

import click


@click.command(hidden=True)
def command() -> None:
    """Run one stage between stdin and stdout."""
    from mlx_k2.stage.__main__ import main

    main()
