"""The profile: the user's own defaults for options, from a file and from environment variables. Runs nothing.

A key of the file is the long name of an option. A key above all tables is the default of every command that has the
option, a key in the table of a command is that command's. A variable MLX_K2_NAME overrides both.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlx_k2.errors import RequestError
from mlx_k2.private_files import home_folder

_OVERRIDES = {"stages": ("hostfile", "split"), "hostfile": ("num_stages", "split"), "model": ("revision",)}
"""Options on the command line, and the parameters whose defaults do not apply together with them."""


@dataclass(frozen=True)
class Default:
    """A default of an option, and where it is written."""

    value: object
    source: str


@dataclass(frozen=True)
class Profile:
    """The values in the file by table and key, '' for the keys above all tables, and the file's text."""

    path: Path
    tables: Mapping[str, Mapping[str, object]]
    text: str = ""

    def where(self, table: str, key: str) -> str:
        """Return the file and the line of a key, or of a table's heading for the key ''."""
        inside = ""
        for number, line in enumerate(self.text.splitlines(), start=1):
            if heading := re.match(r"\s*\[\s*([^\]]*?)\s*\]", line):
                inside = heading[1].strip("\"'")
            is_key = re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line) if key else heading
            if is_key and inside == table:
                return f"{self.path}, line {number}"
        return str(self.path)


def profile_path() -> Path:
    """Return the path of the profile: MLX_K2_CONFIG, or mlx-k2/config.toml in the user's folder of settings."""
    if given := os.environ.get("MLX_K2_CONFIG"):
        return Path(given)
    folder = os.environ.get("XDG_CONFIG_HOME")
    return (Path(folder) if folder else home_folder() / ".config") / "mlx-k2" / "config.toml"


def read_profile(path: Path, commands: Sequence[str], shared: Sequence[str]) -> Profile:
    """Read the profile; without a file it is empty. ``shared`` are the options that may be set above all tables.

    Raises:
        RequestError: the file cannot be read, or names a command or an option that does not exist; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except FileNotFoundError:
        return Profile(path, {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{path} cannot be read: {problem}") from None
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    profile = Profile(path, {"": {name: value for name, value in values.items() if name not in tables}, **tables}, text)
    for name in tables:
        _check_name(name, commands, f"{profile.where(name, '')}: there is no command {name!r}")
    for key in profile.tables[""]:
        where = profile.where("", key)
        _check_name(key, shared, f"{where}: {key!r} is not an option of several commands")
    return profile


def with_value(text: str, key: str, value: str) -> str:
    """Return the text of a profile in which ``key``, above all tables, has ``value``; all else stays."""
    line = f"{key} = {json.dumps(value, ensure_ascii=False)}"
    head, *tables = re.split(r"(?m)^(?=[ \t]*\[)", text, maxsplit=1)
    changed, count = re.subn(rf"(?m)^[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*=.*$", lambda _: line, head)
    return (changed if count else f"{line}\n{head}") + "".join(tables)


def option_name(option: click.Parameter) -> str:
    """Return the long name of an option without its dashes; '' if it has none, or cannot have a default."""
    is_usual = isinstance(option, click.Option) and not option.is_eager and not option.hidden
    return next((name[2:] for name in option.opts if name.startswith("--")), "") if is_usual else ""


def defaults_of(command: click.Command, name: str, profile: Profile) -> dict[str, Default]:
    """Return the defaults of a command's options by the names of their parameters.

    Raises:
        RequestError: the command's table has a key that is not one of its options; names the line.
    """
    options = {option_name(option): option for option in command.params if option_name(option)}
    for key in profile.tables.get(name, {}):
        _check_name(key, options, f"{profile.where(name, key)}: mlx-k2 {name} has no option {key!r}")
    defaults = {}
    for key, option in options.items():
        variable = f"MLX_K2_{key.upper().replace('-', '_')}"
        table = next((table for table in (name, "") if key in profile.tables.get(table, {})), None)
        if os.environ.get(variable):
            default = Default(os.environ[variable], variable)
        elif table is not None:
            default = Default(profile.tables[table][key], profile.where(table, key))
        else:
            continue
        assert option.name is not None
        defaults[option.name] = Default(_click_value(option, default), default.source)
    return defaults


def not_overridden(command: click.Command, defaults: Mapping[str, Default], args: Sequence[str]) -> dict[str, Default]:
    """Return the defaults that apply together with the options of a command line."""
    given = {word.partition("=")[0] for word in args}
    dropped = [_OVERRIDES.get(option_name(option), ()) for option in command.params if given & {*option.opts}]
    return {name: default for name, default in defaults.items() if not any(name in names for names in dropped)}


def with_sources(text: str) -> str:
    """Return an error's text with the source of each option that it names and that came from the profile."""
    context = click.get_current_context(silent=True)
    if context is None:
        return text
    defaults: dict[str, Default] = context.meta.get(__name__, {})
    sources = [
        f"{option_name(option)} is from {defaults[option.name].source}"
        for option in context.command.params
        if option.name in defaults
        and context.get_parameter_source(option.name) is click.core.ParameterSource.DEFAULT_MAP
        and re.search(rf"(?<!\w){re.escape(option_name(option))}(?!\w)", text)
    ]
    return f"{text} ({', '.join(sources)})" if sources else text


def keep_sources(context: click.Context, defaults: Mapping[str, Default]) -> None:
    """Keep the sources of a command's defaults for `with_sources`."""
    context.meta[__name__] = defaults


def _click_value(option: click.Parameter, default: Default) -> object:
    """Return a value as click converts it: lists as repeated or as comma-separated values, ``~`` as the home folder."""
    value: Any = default.value
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, list | dict) for each in value)):
        raise RequestError(f"{default.source}: {option_name(option)} is a table: give one value, or a list")
    if isinstance(value, list) and not option.multiple:
        value = ",".join(map(str, value))
    if option.multiple and not isinstance(value, list):
        value = str(value).split() if default.source.startswith("MLX_K2_") else [value]
    if isinstance(option.type, click.Path) and isinstance(value, str):
        value = str(Path(value).expanduser()) if value.startswith("~") else value
    return value


def _check_name(name: str, known: Sequence[str] | Mapping[str, object], problem: str) -> None:
    if name not in known:
        close = difflib.get_close_matches(name.replace("_", "-"), list(known), 1)
        raise RequestError(f"{problem}: {f'did you mean {close[0]}?' if close else 'leave it out'}")
