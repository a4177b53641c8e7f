"""`mlx-k2 keys`: the API keys of this user's servers."""

import time
from pathlib import Path

import click
import platformdirs

from mlx_k2.cli.console import log
from mlx_k2.server.api_keys import add_key, read_keys, remove_key

key_file_option = click.option(
    "--key-file", type=click.Path(), metavar="FILE", help="Where the keys' digests are.  [default: the user's own]"
)


def key_path(given: str | None) -> Path:
    """Return the key file."""
    return platformdirs.user_config_path("mlx-k2") / "keys.json" if given is None else Path(given)


@click.group()
def command() -> None:
    """Make, list and remove the keys that clients of `mlx-k2 serve` send.

    Once there is a key, every request needs one. A running server sees changes at once.
    """


@command.command()
@click.argument("name")
@key_file_option
def add(name: str, key_file: str | None) -> None:
    """Make a key NAME and print it. It is shown only now."""
    click.echo(add_key(key_path(key_file), name))
    log(f"this is the key {name}; it is stored nowhere and not shown again")


@command.command("list")
@key_file_option
def show(key_file: str | None) -> None:
    """List the names of the keys and the days on which they were made."""
    for key in read_keys(key_path(key_file)):
        click.echo(f"{key.name}\t{time.strftime('%Y-%m-%d', time.localtime(key.created))}")


@command.command()
@click.argument("name")
@key_file_option
def remove(name: str, key_file: str | None) -> None:
    """Remove the key NAME."""
    remove_key(key_path(key_file), name)
