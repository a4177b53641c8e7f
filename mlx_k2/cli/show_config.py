"""`mlx-k2 config`: the defaults of options, and where each one is written."""

import json

import click

from mlx_k2.cli.console import log
from mlx_k2.cli.main import COMMANDS, cli, user_profile
from mlx_k2.cli.profile import Default, defaults_of, option_name, unknown_variables
from mlx_k2.cli.program_command import ProgramCommand


@click.command()
@click.argument("command", metavar="[COMMAND]", required=False, type=click.Choice([*COMMANDS]))
def command(command: str | None) -> None:
    """Show the defaults that you have set, and where each one is written. With COMMAND: all options of that command.

    \b
    ~/.config/mlx-k2/config.toml holds them by their long names, and one table for each command:
        hostfile = "~/two-macs.json"
        model = "moonshotai/Kimi-K2-Thinking"
        [chat]
        temperature = 0.7

    An environment variable, such as MLX_K2_MODEL for --model, overrides the file. The command line overrides both.
    """  # noqa: D301  # click reads the escape
    profile = user_profile()
    log(f"{'the profile is' if profile.text else 'there is no profile:'} {profile.path}")
    context = click.get_current_context()
    shown_defaults: dict[str, Default] = {}
    keys: set[str] = set()
    for name in COMMANDS:
        subcommand = cli.get_command(context, name)
        if not isinstance(subcommand, ProgramCommand) or not subcommand.reads_profile:
            continue
        keys.update(map(option_name, subcommand.params))
        if command not in (None, name):
            continue
        subcommand.make_context(name, [], context.parent)  # raises for a value that the command would refuse
        defaults = defaults_of(subcommand, name, profile)
        for option in subcommand.params:
            key = option_name(option)
            default = defaults.get(option.name or "")
            if default is not None:
                # a variable overrides the table: then the source is the variable's name, not a line of the file
                is_in_table = key in profile.tables.get(name, {}) and default.source == profile.location(name, key)
                # a default of several commands is shown once
                shown_defaults.setdefault(f"{name}.{key}" if command is None and is_in_table else key, default)
            elif command is not None and key:
                shown_defaults[key] = Default(option.to_info_dict()["default"], "default")
    for line in unknown_variables(keys):
        log(line)
    for key, default in shown_defaults.items():
        value = json.dumps(default.value, ensure_ascii=False, default=str) if default.value is not None else "(none)"
        click.echo(f"{key} = {value}  # {default.source}")
