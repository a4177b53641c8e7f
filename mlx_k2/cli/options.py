"""Groups of options for the commands, and structs of them. An option that several commands share is declared once."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from mlx_k2.chat.chat_session import MAX_TOOL_CALLS
from mlx_k2.chat.sampling_options import MAX_ANSWERS
from mlx_k2.cli.option_values import Numbers, RestartLimit, is_on, logit_biases, schema_from_file, text_from_file
from mlx_k2.cli.profile import option_name
from mlx_k2.cli.program_command import GroupedOption
from mlx_k2.deployment.cluster_options import DENSE_BITS, DRAFT_BITS, DTYPES, LEASE_S, MAX_STAGES
from mlx_k2.launch.group import STALL_TIMEOUT_S
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.weights.model_source import BUILTIN

Command = TypeVar("Command", bound=Callable[..., Any] | click.Command)


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The maximum number of restarts after faults, and the folder for logs. ``log_dir`` None: no logs are written.

    ``log_tokens``: the logs have the token ids of prompts and answers, too.
    """

    restarts: int
    log_dir: Path | None
    log_tokens: bool


class ToolOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The tools that a model may call, and the tools whose calls need no approval; ``yes`` approves all calls."""

    tools_path: str | None
    mcp_path: str | None
    yes: bool
    allowed_tools: tuple[str, ...]
    max_tool_calls: int
    tool_timeout_s: float

    def __post_init__(self) -> None:
        """Refuse approvals without tools."""
        if not self.has_tools and (self.allowed_tools or self.yes):
            raise click.UsageError("--yes and --allow-tool are for tools: give --tools or --mcp")

    @property
    def has_tools(self) -> bool:
        """Whether --tools or --mcp is given."""
        return self.tools_path is not None or self.mcp_path is not None


def _combine(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Return a decorator that adds several options to a command."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _model_or_none(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return None, the built-in model, for BUILTIN, with which a command line overrides the model of the profile."""
    return None if value == BUILTIN else value


_cluster_option = functools.partial(click.option, cls=GroupedOption, group="Hosts and model")
cluster_options = _combine(
    _cluster_option(
        "--hostfile",
        type=click.Path(),
        help="The hosts, one stage on each: MLX's own format, as mlx.distributed_config writes it.",
    ),
    _cluster_option(
        "--stages",
        "num_stages",
        type=click.IntRange(1, MAX_STAGES),
        help="Without a hostfile: the number of stages on this machine.  [default: 2 for the built-in model, else 1]",
    ),
    _cluster_option(
        "--model",
        "-m",
        type=click.Path(),
        metavar="PATH_OR_REPO",
        callback=_model_or_none,
        help="A folder with an original checkpoint, or a repository on the Hub.  [default: built-in, a small model]",
    ),
    _cluster_option("--revision", help="The repository's branch, tag or commit."),
    _cluster_option("--split", type=Numbers(1, "31,30"), help="Layers for each stage, in the hostfile's order."),
    _cluster_option(
        "--context",
        "context_tokens",
        type=click.IntRange(min=2),
        help="Maximum tokens per sequence, prompt and answer together. Cache memory is reserved for them.  "
        "[default: 32768, or the model's]",
    ),
    _cluster_option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="The data type of the computation.  [default: bfloat16 on GPUs, float32 if a stage has no GPU]",
    ),
    _cluster_option(
        "--dense-bits",
        type=click.Choice(DENSE_BITS),
        help="Quantize attention, shared experts, dense layers and the head to this number of bits while loading: a "
        "token reads fewer bytes, so that decoding is faster.  [default: as the checkpoint has them]",
    ),
    _cluster_option(
        "--draft-model",
        metavar="PATH_OR_REPO",
        help="A draft head (EAGLE-3) for the model: a folder that each host has, or a repository on the Hub.  "
        "[default: the built-in model's own; none for others]",
    ),
    _cluster_option(
        "--draft-aux",
        type=Numbers(0, "1,29,57"),
        help="The layers, from 0, whose outputs the draft head reads.  [default: as its config.json says]",
    ),
    _cluster_option(
        "--draft-bits",
        type=click.Choice(DRAFT_BITS),
        default=DRAFT_BITS[0],
        show_default=True,
        help="Quantize the draft head to this number of bits while loading. 16 does not quantize it.",
    ),
    _cluster_option(
        "--draft-vocab",
        type=click.IntRange(min=1),
        metavar="N",
        help="Let the draft head propose only the N most frequent tokens, which makes it smaller and faster.  "
        "[default: all its tokens]",
    ),
    _cluster_option(
        "--lease",
        "lease_s",
        type=float,
        default=LEASE_S,
        metavar="SECONDS",
        help="End a stage after this long without a heartbeat from this command, 2 to 3600.  [default: 20]",
    ),
    _cluster_option(
        "--stall-timeout",
        "stall_timeout_s",
        type=click.FloatRange(1, 3600),
        default=STALL_TIMEOUT_S,
        metavar="SECONDS",
        help="Treat a stopped stage, a silent host or a stuck hop as a fault after this long, 1 to 3600.  [default: 7]",
    ),
    _cluster_option(
        "--check-weights",
        is_flag=True,
        help="Search every tensor for NaN and infinity while loading, as --dense-bits does. Without both, only "
        "norms, router, embedding and scales are searched.",
    ),
    _cluster_option("-v", "--verbose", is_flag=True, help="Show the stages' log lines, and all counts and times."),
)

_sampling_option = functools.partial(click.option, cls=GroupedOption, group="Sampling and thinking")
sampling_options = _combine(
    _sampling_option(
        "--system", "--system-prompt", metavar="TEXT", help="The system prompt.  [default: the model's own]"
    ),
    _sampling_option(
        "--max-tokens",
        "-n",
        type=click.IntRange(min=1),
        help="The maximum number of tokens of an answer.  [default: the rest of the context]",
    ),
    _sampling_option(
        "--temperature", "--temp", type=float, help="0 selects the most likely token.  [default: the model's, else 1]"
    ),
    _sampling_option(
        "--top-p",
        type=float,
        help="Keep the most likely tokens that add up to this probability; 0: one token.",
    ),
    _sampling_option("--top-k", type=int, help="Keep this many of the most likely tokens; 0: all."),
    _sampling_option(
        "--min-p", type=float, help="Keep tokens at least this probable, relative to the most likely one."
    ),
    _sampling_option("--repetition-penalty", type=float, help="Above 1: avoid tokens that are among the last 64."),
    _sampling_option(
        "--seed",
        type=int,
        help="The same seed samples the same tokens; -1: a random seed, which is shown.",
    ),
    _sampling_option(
        "--timeout",
        "timeout_s",
        type=float,
        metavar="SECONDS",
        help="End an answer this long after its prefill began, with its text so far.",
    ),
    _sampling_option(
        "--thinking",
        type=click.Choice(["on", "off"]),
        callback=is_on,
        help="Whether the model thinks before it answers. off needs a model with an instant mode (K2.5, K2.6), whose "
        "answers are sampled at temperature 0.6.  [default: the model's]",
    ),
    _sampling_option(
        "--preserve-thinking",
        is_flag=True,
        help="Keep the reasoning of earlier answers in the prompt, for models that have this option (K2.6).",
    ),
    _sampling_option("--thinking-budget", type=click.IntRange(min=0), metavar="N", help="End thinking after N tokens."),
    _sampling_option("--hide-thinking", is_flag=True, help="Do not show what the model thinks."),
)

_answer_option = functools.partial(click.option, cls=GroupedOption, group="Form of the answer")
answer_options = _combine(
    _answer_option(
        "--json-schema",
        type=click.Path(),
        metavar="FILE",
        callback=schema_from_file,
        help="Answer with a JSON value of the schema in FILE. Thinking and tool calls come before it, as usual.",
    ),
    _answer_option(
        "--strict-schema",
        is_flag=True,
        help="Refuse a schema of --json-schema with keywords that cannot be enforced, instead of a warning.",
    ),
    _answer_option("--regex", metavar="PATTERN", help="Answer with a text that matches PATTERN from start to end."),
    _answer_option(
        "--lark",
        type=click.Path(),
        metavar="FILE",
        callback=text_from_file,
        help="Answer with a text of the Lark grammar in FILE.",
    ),
    _answer_option(
        "--tool-choice",
        metavar="CHOICE",
        help="auto, none, required, or the name of the tool to call.  [default: auto]",
    ),
    _answer_option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text. Can be repeated."),
    _answer_option(
        "--min-tokens", type=click.IntRange(min=0), default=0, metavar="N", help="End no answer before N tokens."
    ),
    _answer_option("--ignore-eos", is_flag=True, help="Continue after the end of the answer, up to --max-tokens."),
    _answer_option("--presence-penalty", type=float, help="Above 0: avoid tokens that the answer has, -2 to 2."),
    _answer_option("--frequency-penalty", type=float, help="Above 0: avoid tokens that the answer has often, -2 to 2."),
    _answer_option(
        "--logit-bias",
        multiple=True,
        metavar="ID=BIAS",
        callback=logit_biases,
        help="Add BIAS, -100 to 100, to the logit of token ID. Can be repeated.",
    ),
    _answer_option(
        "--num-answers",
        type=click.IntRange(1, MAX_ANSWERS),
        default=1,
        metavar="N",
        help="Write N answers to the prompt, each with its own seed; the prompt is computed once.  [default: 1]",
    ),
)

_tool_option = functools.partial(click.option, cls=GroupedOption, group="Tools")
tool_grammar_option = _tool_option(
    "--tool-grammar",
    type=click.Choice(["auto", "off"]),
    default="auto",
    callback=is_on,
    help="Whether tool calls follow the tools' names and schemas.  [default: auto]",
)

tool_options = _combine(
    tool_grammar_option,
    _tool_option(
        "--parallel-tool-calls",
        type=click.Choice(["on", "off"]),
        default="on",
        callback=is_on,
        help="Whether a reply may call several tools.  [default: on]",
    ),
    _tool_option(
        "--tools", "tools_path", type=click.Path(), metavar="FILE.py", help="Python functions that the model may call."
    ),
    _tool_option(
        "--mcp", "mcp_path", type=click.Path(), metavar="FILE.json", help="MCP servers whose tools the model may call."
    ),
    _tool_option("--yes", is_flag=True, help="Run all tool calls without asking."),
    _tool_option("--allow-tool", "allowed_tools", multiple=True, metavar="NAME", help="Run this tool without asking."),
    _tool_option(
        "--max-tool-calls",
        type=click.IntRange(min=0),
        default=MAX_TOOL_CALLS,
        show_default=True,
        help="The maximum number of tool calls for one message; after them the model has to answer.",
    ),
    _tool_option(
        "--tool-timeout",
        "tool_timeout_s",
        type=click.FloatRange(0.1, 86400),
        default=120.0,
        metavar="SECONDS",
        help="The time limit of one tool call.  [default: 120]",
    ),
)


_run_option = functools.partial(click.option, cls=GroupedOption, group="Faults and logs")
log_options = _combine(
    _run_option(
        "--log-dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Write the stages' logs and their last steps to DIR, at most 16 MB, and after a fault a report to attach "
        "to an issue. They contain no prompt and no answer.",
    ),
    _run_option("--log-tokens", is_flag=True, help="With --log-dir: write the token ids of prompts and answers, too."),
)
run_options = _combine(
    _run_option(
        "--restarts",
        type=RestartLimit(0, 1000),
        default=3,
        metavar="N",
        help="After a fault, start all stages again and continue the answer: at most N times, or off. "
        "The count starts again after 10 minutes without a fault.  [default: 3]",
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


_add_shared = _combine(cluster_options, sampling_options, answer_options, tool_options, run_options, draft_option)
SHARED_OPTIONS = [option_name(option) for option in _add_shared(click.Command("")).params]
"""The long names of the options above, which the profile may set for all commands that have them."""
