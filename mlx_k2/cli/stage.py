"""`mlx-k2 stage`: what ssh starts on a host whose Python is not where the coordinator's is. Not for people."""

import click


@click.command(hidden=True)
def command() -> None:
    """Run one stage between stdin and stdout."""
    from mlx_k2.stage.__main__ import main

    main()
