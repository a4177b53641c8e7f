"""`mlx-k2 stage`: an internal command that starts a stage over ssh where the path of Python is not known."""

import click


@click.command(hidden=True)
def command() -> None:
    """Run one stage between stdin and stdout."""
    from mlx_k2.stage.__main__ import main

    main()
