"""The class of the commands: help in groups, hints for options of other programs, defaults from the profile."""

import difflib
from typing import Any

import click

from mlx_k2.cli.profile import Default, Profile, defaults_of, keep_sources, option_name, without_overridden
from mlx_k2.errors import RequestError

OWN_OPTIONS = "Options"

_FOREIGN_OPTIONS = {
    "--ctx-size": "--context",
    "--max-kv-size": "--context",
    "--max-model-len": "--context",
    "--max-new-tokens": "--max-tokens",
    "--n-predict": "--max-tokens",
    "--num-predict": "--max-tokens",
    "--hosts": "--hostfile",
    "--no-thinking": "--thinking off",
    "--no-draft": "--draft off",
    "--quiet": "--hide-thinking",
    "-c": "--context",
    "-t": "--temperature",
    "-s": "--system",
}
"""This program's option for each name by which other programs call such an option."""


class GroupedOption(click.Option):
    """An option that help lists under the heading ``group``."""

    def __init__(self, *arguments: Any, group: str, **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.group = group


class ProgramCommand(click.Command):
    """A command of this program. With ``reads_profile`` the profile sets the defaults of its options.

    The object of the parent's context is a function that reads the profile.
    """

    reads_profile = True

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **attributes: Any
    ) -> click.Context:
        """Parse the command line, with the profile's values as defaults.

        Raises:
            RequestError: the profile cannot be read, or a value in it is invalid; names the line.
        """
        defaults: dict[str, Default] = {}
        # help needs no profile, and is shown also when that cannot be read
        if self.reads_profile and parent is not None and parent.obj is not None and not {"-h", "--help"} & set(args):
            profile: Profile = parent.obj()
            defaults = without_overridden(self, defaults_of(self, info_name or "", profile), args)
            attributes["default_map"] = {name: default.value for name, default in defaults.items()}
        try:
            context = super().make_context(info_name, args, parent, **attributes)
        except click.BadParameter as error:
            option, name = error.param, "" if error.param is None else error.param.name or ""
            source = None if error.ctx is None else error.ctx.get_parameter_source(name)
            if option is None or source is not click.core.ParameterSource.DEFAULT_MAP:  # a value of the command line
                raise
            raise RequestError(f"{defaults[name].source}: {option_name(option)}: {error.message}") from None
        keep_sources(context, defaults)
        return context

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in groups, the command's own first."""
        groups: dict[str, list[tuple[str, str]]] = {OWN_OPTIONS: []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(parameter, "group", OWN_OPTIONS), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line. The error for an unknown option suggests a similar name."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.replace("_", "-")
            known_options = [option for parameter in self.get_params(ctx) for option in parameter.opts]
            first_names = [parameter.opts[0] for parameter in self.get_params(ctx) if parameter.opts]
            suggestion = name if name in known_options else _FOREIGN_OPTIONS.get(name, "")
            if suggestion.split(" ")[0] not in known_options:
                suggestion = "".join(difflib.get_close_matches(name, first_names, 1, 0.7))
            if not suggestion:
                raise
            message = f"No such option {error.option_name!r}. Did you mean {suggestion!r}?"
            raise click.NoSuchOption(error.option_name, message, ctx=ctx) from None
