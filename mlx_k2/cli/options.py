"""The options that several commands share, each declared once, and the structs that they become."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from mlx_k2.chat.chat_session import MAX_TOOL_CALLS
from mlx_k2.chat.sampling_options import MAX_ANSWERS
from mlx_k2.cluster.partition import parse_split
from mlx_k2.deployment.cluster_options import DENSE_BITS, DTYPES, LEASE_S, MAX_STAGES
from mlx_k2.errors import RequestError
from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.json_text.read import convert
from mlx_k2.launch.group import STALL_TIMEOUT_S

_MAX_DIGITS = 10

Command = TypeVar("Command", bound=Callable[..., Any])
Options = TypeVar("Options", bound=msgspec.Struct)


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What happens after a fault, and what is kept of a run. ``restarts`` 0: a fault is final."""

    restarts: int
    log_dir: str | None
    log_tokens: bool

    @property
    def arguments(self) -> tuple[int, Path | None, bool]:
        """The last arguments of RestartingDeployment: limit of restarts, log folder, whether to log token ids."""
        return self.restarts, None if self.log_dir is None else Path(self.log_dir), self.log_tokens


class ToolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The tools that a model may call, and which calls need no approval. Tools and approvals: cli/toolkit.py."""

    tools_path: str | None
    mcp_path: str | None
    yes: bool
    allowed_tools: tuple[str, ...]
    max_tool_calls: int
    tool_timeout_s: float

    def __post_init__(self) -> None:
        """Refuse approvals without tools."""
        if not self.is_given and (self.allowed_tools or self.yes):
            raise click.UsageError("--yes and --allow-tool are for tools: give --tools or --mcp")

    @property
    def is_given(self) -> bool:
        """Whether there are tools."""
        return self.tools_path is not None or self.mcp_path is not None


def with_struct(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Call a command with its options as one checked ``kind``, before it does anything.

    A field whose type is a struct gets the options that are that struct's fields.
    """

    def decorate(run: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(run)
        def command(**values: Any) -> None:
            fields = _nested(kind, values)
            assert not values, f"{kind.__name__} has no field for {', '.join(values)}"
            try:
                options = convert(fields, kind)
            except JsonError as error:
                raise RequestError(str(error)) from None
            run(options)

        return command

    return decorate


def _nested(kind: type[msgspec.Struct], values: dict[str, Any]) -> dict[str, Any]:
    """Move the values of the fields of ``kind`` out of ``values``; return them by their names in JSON."""
    fields = {}
    for field in msgspec.structs.fields(kind):
        is_struct = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        if is_struct:
            fields[field.encode_name] = _nested(field.type, values)
        elif field.name in values:
            fields[field.encode_name] = values.pop(field.name)
    return fields


def _layer_counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    return None if value is None else parse_split(value)


def _token_ids(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    parts = [] if value is None else [part.strip() for part in value.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and len(part) < _MAX_DIGITS):
            found = part[:_MAX_DIGITS]
            raise RequestError(f"--token-ids: {found!r} is not a token id: write numbers with commas, as in 3,4,5")
    return None if value is None else tuple(map(int, parts))


def _is_on(ctx: click.Context, param: click.Parameter, value: str | None) -> bool | None:
    return None if value is None else value == "on"


def _is_ngram(ctx: click.Context, param: click.Parameter, value: str) -> bool:
    return value == "ngram"


def _schema_file(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    text = _text_file(ctx, param, value)
    try:
        return None if text is None else parse_json(text)
    except JsonError as error:
        raise RequestError(f"--json-schema: {value}: {error}") from None


def _text_file(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise RequestError(f"{param.opts[0]}: {value} cannot be read: {problem}") from None


def _biases(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    biases: dict[int, float] = {}
    for value in values:
        token_id, _, bias = value.partition("=")
        try:
            number, amount = int(token_id), float(bias)
        except ValueError:
            raise RequestError(f"--logit-bias {value!r}: write a token id and a number, as in 42=-10") from None
        if number in biases:
            raise RequestError(f"--logit-bias {value!r}: token {number} has a bias already")
        biases[number] = amount
    return biases


_CLUSTER = (
    click.option(
        "--hostfile",
        type=click.Path(),
        help="The hosts, one stage on each: MLX's own format, as mlx.distributed_config writes it.",
    ),
    click.option(
        "--stages",
        "num_stages",
        type=click.IntRange(1, MAX_STAGES),
        help="Without a hostfile: how many stages to run on this machine.  [default: 2 for the built-in model, else 1]",
    ),
    click.option(
        "--model",
        metavar="PATH_OR_REPO",
        help="A folder with an original checkpoint, or a repository on the Hub.  [default: a small built-in model]",
    ),
    click.option("--revision", help="The repository's branch, tag or commit."),
    click.option(
        "--split", callback=_layer_counts, metavar="N,N,...", help="Layers for each stage, in the hostfile's order."
    ),
    click.option(
        "--context",
        "context_tokens",
        type=click.IntRange(min=2),
        help="Maximum tokens per sequence, prompt and answer together. Cache memory is reserved for them.  "
        "[default: 32768, or the model's]",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="What to compute in.  [default: bfloat16 on GPUs, float32 where a stage has none]",
    ),
    click.option(
        "--dense-bits",
        type=click.Choice(DENSE_BITS),
        help="Quantize attention, shared experts, dense layers and the head to so many bits while loading: a token "
        "reads less and comes sooner.  [default: as the checkpoint has them]",
    ),
    click.option(
        "--lease",
        "lease_s",
        type=float,
        default=LEASE_S,
        metavar="SECONDS",
        help="End a stage after this long without a heartbeat from this command, 2 to 3600.  [default: 20]",
    ),
    click.option(
        "--stall-timeout",
        "stall_timeout_s",
        type=click.FloatRange(1, 3600),
        default=STALL_TIMEOUT_S,
        metavar="SECONDS",
        help="Treat a stopped stage, a silent host or a stuck hop as a fault after this long, 1 to 3600.  [default: 7]",
    ),
    click.option(
        "--check-weights",
        is_flag=True,
        help="Search every tensor for NaN and infinity while loading. Without it, and "
        "without --dense-bits: norms, router, embedding and scales.",
    ),
    click.option("-v", "--verbose", is_flag=True, help="Show what the stages write to their logs."),
)

_SAMPLING = (
    click.option(
        "--max-tokens", type=click.IntRange(min=1), help="The most tokens of an answer.  [default: what fits]"
    ),
    click.option("--temperature", type=float, help="0 takes the most likely token.  [default: the model's, else 1]"),
    click.option("--top-p", type=float, help="Keep the most likely tokens that add up to this probability."),
    click.option("--top-k", type=int, help="Keep this many of the most likely tokens."),
    click.option("--min-p", type=float, help="Keep tokens at least this probable, relative to the most likely one."),
    click.option("--repetition-penalty", type=float, help="Above 1: avoid the last 64 tokens."),
    click.option("--seed", type=int, help="The same seed samples the same tokens.  [default: a random one]"),
    click.option(
        "--timeout",
        "timeout_s",
        type=float,
        metavar="SECONDS",
        help="End an answer that has run for so long, from when its prompt begins, with what it has; others go on.",
    ),
    click.option(
        "--thinking",
        type=click.Choice(["on", "off"]),
        callback=_is_on,
        help="Whether the model thinks before it answers. off needs a model with an instant mode (K2.5, K2.6), whose "
        "answers are sampled at temperature 0.6.  [default: the model's]",
    ),
    click.option(
        "--preserve-thinking",
        is_flag=True,
        help="Keep the reasoning of earlier answers in the prompt, for models that have this option (K2.6).",
    ),
    click.option("--thinking-budget", type=click.IntRange(min=0), metavar="N", help="End thinking after N tokens."),
    click.option("--hide-thinking", is_flag=True, help="Do not show what the model thinks."),
)

_ANSWERS = (
    click.option(
        "--json-schema",
        metavar="FILE",
        callback=_schema_file,
        help="Answer with a JSON value of the schema in FILE. Thinking and tool calls come before it, as usual.",
    ),
    click.option(
        "--strict-schema",
        is_flag=True,
        help="Refuse a schema of --json-schema with a keyword that cannot be enforced, in place of a warning.",
    ),
    click.option("--regex", metavar="PATTERN", help="Answer with a text that PATTERN matches as a whole."),
    click.option("--lark", metavar="FILE", callback=_text_file, help="Answer with a text of the Lark grammar in FILE."),
    click.option(
        "--tool-choice",
        metavar="CHOICE",
        help="auto, none, required, or the name of the tool to call.  [default: auto]",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text. Can be repeated."),
    click.option(
        "--min-tokens", type=click.IntRange(min=0), default=0, metavar="N", help="Do not end before N tokens."
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on after the end of the answer, up to --max-tokens."),
    click.option("--presence-penalty", type=float, help="Above 0: avoid tokens that the answer has, -2 to 2."),
    click.option("--frequency-penalty", type=float, help="Above 0: avoid tokens that the answer has often, -2 to 2."),
    click.option(
        "--logit-bias",
        multiple=True,
        metavar="ID=BIAS",
        callback=_biases,
        help="Add BIAS, -100 to 100, to the logit of token ID. Can be repeated.",
    ),
    click.option(
        "--num-answers",
        type=click.IntRange(1, MAX_ANSWERS),
        default=1,
        metavar="N",
        help="Write N answers to the prompt, which is computed once. Each has a seed of its own.  [default: 1]",
    ),
)

tool_grammar_option = click.option(
    "--tool-grammar",
    type=click.Choice(["auto", "off"]),
    default="auto",
    callback=lambda _ctx, _param, value: value == "auto",
    help="Whether tool calls follow the tools' names and schemas.  [default: auto]",
)

_TOOLS = (
    tool_grammar_option,
    click.option(
        "--parallel-tool-calls",
        type=click.Choice(["on", "off"]),
        default="on",
        callback=_is_on,
        help="Whether a reply may call several tools.  [default: on]",
    ),
    click.option("--tools", "tools_path", metavar="FILE.py", help="Python functions that the model may call."),
    click.option("--mcp", "mcp_path", metavar="FILE.json", help="MCP servers whose tools the model may call."),
    click.option("--yes", is_flag=True, help="Run every tool call without asking."),
    click.option("--allow-tool", "allowed_tools", multiple=True, metavar="NAME", help="Run this tool without asking."),
    click.option(
        "--max-tool-calls",
        type=click.IntRange(min=0),
        default=MAX_TOOL_CALLS,
        show_default=True,
        help="So many tool calls for one message, then the model has to answer.",
    ),
    click.option(
        "--tool-timeout",
        "tool_timeout_s",
        type=click.FloatRange(0.1, 86400),
        default=120.0,
        metavar="SECONDS",
        help="How long one tool call may take.  [default: 120]",
    ),
)


class _Limit(click.ParamType[int]):
    """A number of times from 0 to 1000, or ``off`` for 0."""

    name = "limit"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number; 0 for ``off``."""
        if value == "off":
            return 0
        return int(click.IntRange(0, 1000).convert(value, param, ctx))


_RESTARTS = (
    click.option(
        "--restarts",
        type=_Limit(),
        default=3,
        metavar="N",
        help="After a fault, start all stages again and go on with the answer: at most N times, or off. "
        "10 minutes without a fault begin a new count.  [default: 3]",
    ),
)

_LOGGING = (
    click.option(
        "--log-dir",
        metavar="DIR",
        help="Keep the stages' logs and the last steps there, at most 16 MB; after a fault a report to attach to an "
        "issue. No prompt and no answer is in it.",
    ),
    click.option("--log-tokens", is_flag=True, help="With --log-dir: the token ids of prompts and answers, too."),
)

token_ids_option = click.option(
    "--token-ids", callback=_token_ids, metavar="N,N,...", help="The prompt as token ids, as they are."
)

draft_option = click.option(
    "--draft",
    "drafts",
    callback=_is_ngram,
    type=click.Choice(["off", "ngram"]),
    default="ngram",
    show_default=True,
    help="While one answer runs alone, let idle stages compute draft tokens: taken from the text so far (ngram), or "
    "none (off). The answer is the same.",
)


def cluster_options(command: Command) -> Command:
    """Add the options for hosts and model to a command."""
    return _with(_CLUSTER, command)


def sampling_options(command: Command) -> Command:
    """Add the options for sampling and thinking to a command."""
    return _with(_SAMPLING, command)


def answer_options(command: Command) -> Command:
    """Add the options for the form, the end and the number of answers to a command."""
    return _with(_ANSWERS, command)


def tool_options(command: Command) -> Command:
    """Add the options for tools to a command."""
    return _with(_TOOLS, command)


def run_options(command: Command) -> Command:
    """Add the options for restarts and logs to a command: RunOptions."""
    return _with((*_RESTARTS, *_LOGGING), command)


def log_options(command: Command) -> Command:
    """Add the options for logs to a command."""
    return _with(_LOGGING, command)


def _with(options: tuple[Callable[[Command], Command], ...], command: Command) -> Command:
    for option in reversed(options):
        command = option(command)
    return command
