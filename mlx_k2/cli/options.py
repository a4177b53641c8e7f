"""The options that several commands share, each declared once, and the structs that they become."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from mlx_k2.chat.chat_session import MAX_TOOL_CALLS
from mlx_k2.chat.sampling_options import MAX_ANSWERS
from mlx_k2.cli.profile import option_name, with_sources
from mlx_k2.cli.program_command import GroupedOption
from mlx_k2.deployment.cluster_options import DENSE_BITS, DRAFT_BITS, DTYPES, LEASE_S, MAX_STAGES
from mlx_k2.errors import RequestError, SetupError
from mlx_k2.json_text.parse import JsonError, parse_json
from mlx_k2.json_text.read import convert
from mlx_k2.launch.group import STALL_TIMEOUT_S
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.weights.model_source import BUILTIN

_MAX_DIGITS = 10

Command = TypeVar("Command", bound=Callable[..., Any] | click.Command)
Options = TypeVar("Options", bound=msgspec.Struct)


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What happens after a fault, and what is kept of a run. ``restarts`` 0: a fault is final."""

    restarts: int
    log_dir: Path | None
    log_tokens: bool


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
            except SetupError as error:
                raise RequestError(with_sources(str(error))) from None
            except click.UsageError as error:
                raise click.UsageError(with_sources(error.message)) from None
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


class Numbers(click.ParamType[tuple[int, ...]]):
    """Whole numbers from ``minimum`` on, separated by commas, as in ``example``."""

    name = "N,N,..."

    def __init__(self, minimum: int, example: str) -> None:
        self._minimum = minimum
        self._example = example

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Return the numbers as a tuple."""
        parts = [part.strip() for part in str(value).split(",")]
        for part in parts:
            is_number = part.isascii() and part.isdigit() and len(part) < _MAX_DIGITS
            if not is_number or int(part) < self._minimum:
                name = "" if param is None else f"{param.opts[0]}: "
                raise RequestError(
                    f"{name}{part[:_MAX_DIGITS]!r} is not a whole number from {self._minimum}: write numbers with "
                    f"commas, as in {self._example}"
                )
        return tuple(map(int, parts))


def _is_on(ctx: click.Context, param: click.Parameter, value: str | None) -> bool | None:
    return None if value is None else value != "off"


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


def _all(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return a decorator that adds several options to a command."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


_cluster = functools.partial(click.option, cls=GroupedOption, group="Hosts and model")
cluster_options = _all(
    _cluster(
        "--hostfile",
        type=click.Path(),
        help="The hosts, one stage on each: MLX's own format, as mlx.distributed_config writes it.",
    ),
    _cluster(
        "--stages",
        "num_stages",
        type=click.IntRange(1, MAX_STAGES),
        help="Without a hostfile: how many stages to run on this machine.  [default: 2 for the built-in model, else 1]",
    ),
    _cluster(
        "--model",
        "-m",
        type=click.Path(),
        metavar="PATH_OR_REPO",
        callback=lambda _ctx, _param, value: None if value == BUILTIN else value,
        help="A folder with an original checkpoint, or a repository on the Hub.  [default: built-in, a small model]",
    ),
    _cluster("--revision", help="The repository's branch, tag or commit."),
    _cluster("--split", type=Numbers(1, "31,30"), help="Layers for each stage, in the hostfile's order."),
    _cluster(
        "--context",
        "context_tokens",
        type=click.IntRange(min=2),
        help="Maximum tokens per sequence, prompt and answer together. Cache memory is reserved for them.  "
        "[default: 32768, or the model's]",
    ),
    _cluster(
        "--dtype",
        type=click.Choice(DTYPES),
        help="What to compute in.  [default: bfloat16 on GPUs, float32 where a stage has none]",
    ),
    _cluster(
        "--dense-bits",
        type=click.Choice(DENSE_BITS),
        help="Quantize attention, shared experts, dense layers and the head to this number of bits while loading: a "
        "token reads fewer bytes, so that decoding is faster.  [default: as the checkpoint has them]",
    ),
    _cluster(
        "--draft-model",
        metavar="PATH_OR_REPO",
        help="A draft head (EAGLE-3) for the model: a folder that each host has, or a repository on the Hub.  "
        "[default: the built-in model's own; none for others]",
    ),
    _cluster(
        "--draft-aux",
        type=Numbers(0, "1,29,57"),
        help="The layers, from 0, whose outputs the draft head reads.  [default: as its config.json says]",
    ),
    _cluster(
        "--draft-bits",
        type=click.Choice(DRAFT_BITS),
        default=DRAFT_BITS[0],
        show_default=True,
        help="Quantize the draft head to this number of bits while loading. 16 keeps it as it is.",
    ),
    _cluster(
        "--draft-vocab",
        type=click.IntRange(min=1),
        metavar="N",
        help="Let the draft head propose only the N most frequent tokens: it is then smaller and faster.  "
        "[default: all that it has]",
    ),
    _cluster(
        "--lease",
        "lease_s",
        type=float,
        default=LEASE_S,
        metavar="SECONDS",
        help="End a stage after this long without a heartbeat from this command, 2 to 3600.  [default: 20]",
    ),
    _cluster(
        "--stall-timeout",
        "stall_timeout_s",
        type=click.FloatRange(1, 3600),
        default=STALL_TIMEOUT_S,
        metavar="SECONDS",
        help="Treat a stopped stage, a silent host or a stuck hop as a fault after this long, 1 to 3600.  [default: 7]",
    ),
    _cluster(
        "--check-weights",
        is_flag=True,
        help="Search every tensor for NaN and infinity while loading, as --dense-bits does. Without both, only "
        "norms, router, embedding and scales are searched.",
    ),
    _cluster(
        "-v", "--verbose", is_flag=True, help="Show what the stages write to their logs, and all counts and times."
    ),
)

_sampling = functools.partial(click.option, cls=GroupedOption, group="Sampling and thinking")
sampling_options = _all(
    _sampling("--system", "--system-prompt", metavar="TEXT", help="The system prompt.  [default: the model's own]"),
    _sampling(
        "--max-tokens", "-n", type=click.IntRange(min=1), help="The most tokens of an answer.  [default: what fits]"
    ),
    _sampling(
        "--temperature", "--temp", type=float, help="0 takes the most likely token.  [default: the model's, else 1]"
    ),
    _sampling(
        "--top-p",
        type=float,
        help="Keep the most likely tokens that add up to this probability; 0: one token.",
    ),
    _sampling("--top-k", type=int, help="Keep this many of the most likely tokens; 0: all."),
    _sampling("--min-p", type=float, help="Keep tokens at least this probable, relative to the most likely one."),
    _sampling("--repetition-penalty", type=float, help="Above 1: avoid the last 64 tokens."),
    _sampling(
        "--seed",
        type=int,
        help="The same seed samples the same tokens; -1: a random one, which is shown.",
    ),
    _sampling(
        "--timeout",
        "timeout_s",
        type=float,
        metavar="SECONDS",
        help="End an answer after this long, counted from the start of its prompt, with its text so far.",
    ),
    _sampling(
        "--thinking",
        type=click.Choice(["on", "off"]),
        callback=_is_on,
        help="Whether the model thinks before it answers. off needs a model with an instant mode (K2.5, K2.6), whose "
        "answers are sampled at temperature 0.6.  [default: the model's]",
    ),
    _sampling(
        "--preserve-thinking",
        is_flag=True,
        help="Keep the reasoning of earlier answers in the prompt, for models that have this option (K2.6).",
    ),
    _sampling("--thinking-budget", type=click.IntRange(min=0), metavar="N", help="End thinking after N tokens."),
    _sampling("--hide-thinking", is_flag=True, help="Do not show what the model thinks."),
)

_answer = functools.partial(click.option, cls=GroupedOption, group="Form of the answer")
answer_options = _all(
    _answer(
        "--json-schema",
        type=click.Path(),
        metavar="FILE",
        callback=_schema_file,
        help="Answer with a JSON value of the schema in FILE. Thinking and tool calls come before it, as usual.",
    ),
    _answer(
        "--strict-schema",
        is_flag=True,
        help="Refuse a schema of --json-schema with a keyword that cannot be enforced, in place of a warning.",
    ),
    _answer("--regex", metavar="PATTERN", help="Answer with a text that PATTERN matches as a whole."),
    _answer(
        "--lark",
        type=click.Path(),
        metavar="FILE",
        callback=_text_file,
        help="Answer with a text of the Lark grammar in FILE.",
    ),
    _answer(
        "--tool-choice",
        metavar="CHOICE",
        help="auto, none, required, or the name of the tool to call.  [default: auto]",
    ),
    _answer("--stop", multiple=True, metavar="TEXT", help="End the answer before this text. Can be repeated."),
    _answer("--min-tokens", type=click.IntRange(min=0), default=0, metavar="N", help="Do not end before N tokens."),
    _answer("--ignore-eos", is_flag=True, help="Go on after the end of the answer, up to --max-tokens."),
    _answer("--presence-penalty", type=float, help="Above 0: avoid tokens that the answer has, -2 to 2."),
    _answer("--frequency-penalty", type=float, help="Above 0: avoid tokens that the answer has often, -2 to 2."),
    _answer(
        "--logit-bias",
        multiple=True,
        metavar="ID=BIAS",
        callback=_biases,
        help="Add BIAS, -100 to 100, to the logit of token ID. Can be repeated.",
    ),
    _answer(
        "--num-answers",
        type=click.IntRange(1, MAX_ANSWERS),
        default=1,
        metavar="N",
        help="Write N answers to the prompt, which is computed once. Each has its own seed.  [default: 1]",
    ),
)

_tool = functools.partial(click.option, cls=GroupedOption, group="Tools")
tool_grammar_option = _tool(
    "--tool-grammar",
    type=click.Choice(["auto", "off"]),
    default="auto",
    callback=_is_on,
    help="Whether tool calls follow the tools' names and schemas.  [default: auto]",
)

tool_options = _all(
    tool_grammar_option,
    _tool(
        "--parallel-tool-calls",
        type=click.Choice(["on", "off"]),
        default="on",
        callback=_is_on,
        help="Whether a reply may call several tools.  [default: on]",
    ),
    _tool(
        "--tools", "tools_path", type=click.Path(), metavar="FILE.py", help="Python functions that the model may call."
    ),
    _tool(
        "--mcp", "mcp_path", type=click.Path(), metavar="FILE.json", help="MCP servers whose tools the model may call."
    ),
    _tool("--yes", is_flag=True, help="Run every tool call without asking."),
    _tool("--allow-tool", "allowed_tools", multiple=True, metavar="NAME", help="Run this tool without asking."),
    _tool(
        "--max-tool-calls",
        type=click.IntRange(min=0),
        default=MAX_TOOL_CALLS,
        show_default=True,
        help="At most this many tool calls for one message; then the model has to answer.",
    ),
    _tool(
        "--tool-timeout",
        "tool_timeout_s",
        type=click.FloatRange(0.1, 86400),
        default=120.0,
        metavar="SECONDS",
        help="How long one tool call may take.  [default: 120]",
    ),
)


class _Limit(click.IntRange):
    """A number of times, or ``off`` for 0."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number; 0 for ``off``."""
        return 0 if value == "off" else int(super().convert(value, param, ctx))


_run = functools.partial(click.option, cls=GroupedOption, group="Faults and logs")
log_options = _all(
    _run(
        "--log-dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Keep the stages' logs and the last steps there, at most 16 MB; after a fault a report to attach to an "
        "issue. No prompt and no answer is in it.",
    ),
    _run("--log-tokens", is_flag=True, help="With --log-dir: the token ids of prompts and answers, too."),
)
run_options = _all(
    _run(
        "--restarts",
        type=_Limit(0, 1000),
        default=3,
        metavar="N",
        help="After a fault, start all stages again and continue the answer: at most N times, or off. "
        "10 minutes without a fault begin a new count.  [default: 3]",
    ),
    log_options,
)

draft_option = click.option(
    "--draft",
    "draft_mode",
    type=click.Choice([mode.value for mode in DraftMode]),
    default=DraftMode.AUTO.value,
    show_default=True,
    metavar="MODE",
    help="While one answer runs alone, let idle stages compute draft tokens: of the draft model (model), from the text "
    "so far (ngram), whichever is expected to be faster (auto), or none (off). The answer is the same.",
)


_shared = _all(cluster_options, sampling_options, answer_options, tool_options, run_options, draft_option)
SHARED_OPTIONS = [option_name(option) for option in _shared(click.Command("all")).params]
"""The long names of the options that several commands have."""
