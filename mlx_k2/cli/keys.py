"""`mlx-k2 keys`: the API keys of this user's servers."""

import shlex
import time
from pathlib import Path

import click
import platformdirs

from mlx_k2.cli.console import log
from mlx_k2.server.api_keys import add_key, read_keys, remove_key

api_keys_option = click.option(
    "--key-file",
    "api_keys_path",
    type=click.Path(),
    metavar="FILE",
    help="The file with the keys' names and digests.  [default: the user's own]",
)


def api_keys_file(path: str | None) -> Path:
    """Return the path of the file with the digests of the keys; None: in the user's configuration folder."""
    return platformdirs.user_config_path("mlx-k2") / "keys.json" if path is None else Path(path)


def add_key_command(path: str | None) -> str:
    """Return the command that adds a key to the file at ``path``; None: to the user's own."""
    key_option = "" if path is None else f" --key-file {shlex.quote(path)}"
    return f"mlx-k2 keys add{key_option} NAME"


@click.group()
def command() -> None:
    """Make, list and remove the keys that clients of `mlx-k2 serve` send.

    Once there is a key, every request needs one, also after the last key is removed. A change applies to running
    servers at once.
    """


@command.command()
@click.argument("name")
@api_keys_option
def add(name: str, api_keys_path: str | None) -> None:
    """Make the key NAME and print it. The key is not shown again."""
    click.echo(add_key(api_keys_file(api_keys_path), name))
    log(f"this is the key {name}; it is stored nowhere and not shown again")


@command.command("list")
@api_keys_option
def show(api_keys_path: str | None) -> None:
    """List the names of the keys and the days on which they were made."""
    for key in read_keys(api_keys_file(api_keys_path)):
        click.echo(f"{key.name}\t{time.strftime('%Y-%m-%d', time.localtime(key.created))}")


@command.command()
@click.argument("name")
@api_keys_option
def remove(name: str, api_keys_path: str | None) -> None:
    """Remove the key NAME. Running servers refuse it from then on."""
    path = api_keys_file(api_keys_path)
    remove_key(path, name)
    log(f"the key {name} is removed; servers refuse it from now on")
    if not read_keys(path):
        log(
            f"no key is left, and servers refuse every request: make one with `{add_key_command(api_keys_path)}`; "
            f"or, to need none on 127.0.0.1, remove {path} and start the server again"
        )
