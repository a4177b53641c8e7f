"""The profile: the user's own defaults for options, from a file and from environment variables. Runs nothing.

A key of the file is the long name of an option. A key above all tables sets the default of every command that has the
option; a key in a command's table sets the default of that command. A variable MLX_K2_NAME overrides both.
"""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mlx_k2.bounded_read import read_file
from mlx_k2.errors import RequestError
from mlx_k2.private_files import home_folder

_VARIABLE_PREFIX = "MLX_K2_"
_OVERRIDDEN_BY = {"stages": ("hostfile", "split"), "hostfile": ("num_stages", "split"), "model": ("revision",)}
"""The parameters whose defaults could contradict an option of the command line and then do not apply, by its name."""


@dataclass(frozen=True)
class Default:
    """A default of an option, and where it is written."""

    value: object
    source: str


@dataclass(frozen=True)
class Profile:
    """The values in the file by table and key, and the file's text. The keys above all tables are in the table ''."""

    path: Path
    tables: Mapping[str, Mapping[str, object]]
    text: str = ""

    def location(self, table: str, key: str) -> str:
        """Return the path and the line of a key, or of the table's heading for the key ''; else only the path."""
        current_table = ""
        for number, line in enumerate(self.text.splitlines(), start=1):
            if heading := re.match(r"\s*\[\s*([^\]]*?)\s*\]", line):
                current_table = heading[1].strip("\"'")
            match = re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*=", line) if key else heading
            if match and current_table == table:
                return f"{self.path}, line {number}"
        return str(self.path)


def profile_path() -> Path:
    """Return the path of the profile: MLX_K2_CONFIG, or mlx-k2/config.toml in XDG_CONFIG_HOME or ~/.config."""
    if path := os.environ.get("MLX_K2_CONFIG"):
        return Path(path)
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or home_folder() / ".config")
    return folder / "mlx-k2" / "config.toml"


def read_profile(path: Path, commands: Sequence[str], shared_options: Sequence[str]) -> Profile:
    """Read the profile; without a file it is empty. Only the options in ``shared_options`` may be above all tables.

    Raises:
        RequestError: the file cannot be read, or names a command or an option that does not exist; names the line.
    """
    try:
        text = read_file(path).decode()
        values = tomllib.loads(text)
    except FileNotFoundError:
        return Profile(path, {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise RequestError(f"{path} cannot be read: {problem}") from None
    tables = {name: value for name, value in values.items() if isinstance(value, dict)}
    top_level = {name: value for name, value in values.items() if name not in tables}
    profile = Profile(path, {"": top_level, **tables}, text)
    for name in tables:
        _check_name(name, commands, f"{profile.location(name, '')}: there is no command {name!r}")
    for key in profile.tables[""]:
        _check_name(
            key, shared_options, f"{profile.location('', key)}: {key!r} is not an option that several commands have"
        )
    return profile


def with_value(text: str, key: str, value: str) -> str:
    """Return the text of a profile with ``value`` for ``key`` above all tables, and all other lines unchanged."""
    line = f"{key} = {json.dumps(value, ensure_ascii=False)}"
    head, *tables = re.split(r"(?m)^(?=[ \t]*\[)", text, maxsplit=1)
    new_head, num_replaced = re.subn(rf"(?m)^[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*=.*$", lambda _: line, head)
    return (new_head if num_replaced else f"{line}\n{head}") + "".join(tables)


def option_name(option: click.Parameter) -> str:
    """Return the long name of an option without its dashes; '' if the profile cannot set this parameter."""
    can_be_set = isinstance(option, click.Option) and not option.is_eager and not option.hidden
    return next((name[2:] for name in option.opts if name.startswith("--")), "") if can_be_set else ""


def defaults_of(command: click.Command, name: str, profile: Profile) -> dict[str, Default]:
    """Return the defaults of a command's options by the names of their parameters.

    Raises:
        RequestError: a value is a table, or the command's table has a key that is no option of the command; names the
            line.
    """
    options = {option_name(option): option for option in command.params if option_name(option)}
    for key in profile.tables.get(name, {}):
        _check_name(key, options, f"{profile.location(name, key)}: mlx-k2 {name} has no option {key!r}")
    defaults = {}
    for key, option in options.items():
        if (default := _default(key, name, profile)) is not None:
            assert option.name is not None
            defaults[option.name] = Default(_click_value(option, default), default.source)
    return defaults


def _default(key: str, command: str, profile: Profile) -> Default | None:
    """Return the default of an option of a command, as it is written; None if there is none."""
    variable = _variable(key)
    if value := os.environ.get(variable):
        return Default(value, variable)
    for table in (command, ""):
        if key in profile.tables.get(table, {}):
            return Default(profile.tables[table][key], profile.location(table, key))
    return None


def unknown_variables(keys: Collection[str]) -> Iterator[str]:
    """Yield a line about each variable that sets no option of ``keys``, but is named almost like one that does."""
    known = {_variable(key) for key in keys}
    for name in sorted(os.environ):
        if name.startswith(_VARIABLE_PREFIX) and name not in known:
            for similar_name in difflib.get_close_matches(name, known, 1, 0.85):
                yield f"{name} sets no option: did you mean {similar_name}?"


def _variable(key: str) -> str:
    """Return the name of the environment variable for an option."""
    return f"{_VARIABLE_PREFIX}{key.upper().replace('-', '_')}"


def without_overridden(
    command: click.Command, defaults: Mapping[str, Default], args: Sequence[str]
) -> dict[str, Default]:
    """Return the defaults that apply together with the options of the command line ``args``."""
    words = {word.partition("=")[0] for word in args}
    names = [option_name(option) for option in command.params if words & {*option.opts}]
    overridden = {parameter for name in names for parameter in _OVERRIDDEN_BY.get(name, ())}
    return {name: default for name, default in defaults.items() if name not in overridden}


def with_sources(text: str) -> str:
    """Return an error's text with the source of each option that the text names and the profile has set."""
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
    """Return a default's value in the form that click converts.

    A repeatable option gets a list, a list for another option becomes comma-separated values, and ``~`` at the start of
    a path becomes the home folder.
    """
    value: Any = default.value
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, list | dict) for item in items):
        raise RequestError(f"{default.source}: {option_name(option)} is a table: give one value, or a list")
    if option.multiple:
        is_variable = default.source.startswith(_VARIABLE_PREFIX)
        return str(value).split() if is_variable else items
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(option.type, click.Path) and isinstance(value, str) and value.startswith("~"):
        return str(Path(value).expanduser())
    return value


def _check_name(name: str, known_names: Sequence[str] | Mapping[str, object], problem: str) -> None:
    """Raise RequestError with ``problem`` and a suggestion if ``name`` is not in ``known_names``."""
    if name not in known_names:
        similar_names = difflib.get_close_matches(name.replace("_", "-"), list(known_names), 1)
        hint = f"did you mean {similar_names[0]}?" if similar_names else "leave it out"
        raise RequestError(f"{problem}: {hint}")
