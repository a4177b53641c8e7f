"""The checked options of `mlx-k2 generate`, and the text of its prompt. Starts nothing."""

import os
import select
import stat
import sys

import click
import msgspec

from mlx_k2.bounded_read import read_stream
from mlx_k2.cli.console import log
from mlx_k2.cli.conversation_options import ConversationOptions
from mlx_k2.cli.options import RunOptions
from mlx_k2.deployment.cluster_options import ClusterOptions
from mlx_k2.errors import RequestError
from mlx_k2.sampling import GenerationConfig
from mlx_k2.scheduling.drafter import DraftMode

STANDARD_INPUT = "-"
_SILENT_WAIT_S = 2.0
"""Seconds without piped input after which a line on stderr says that standard input is read."""


class GenerateOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mlx-k2 generate`."""

    cluster: ClusterOptions
    conversation: ConversationOptions
    run: RunOptions
    connect: str | None
    prompts_path: str | None
    out_path: str | None
    prompt: str | None
    prompt_text: str | None
    raw: bool
    token_ids: tuple[int, ...] | None
    draft_mode: DraftMode
    num_logprobs: int | None
    as_json: bool
    hide_thinking: bool
    dry_run: bool
    verbose: bool

    def __post_init__(self) -> None:
        """Refuse options that contradict each other, and a number for --logprobs that is out of range."""
        if self.prompt is not None and self.prompt_text is not None:
            raise click.UsageError("PROMPT and --prompt are the same: give one of them")
        if self.connect is not None and (self.dry_run or self.prompts_path is not None):
            raise click.UsageError(
                "--dry-run and --prompts are about stages that this command starts: leave them out with --connect"
            )
        if self.connect is not None and self.conversation.sampling.num_answers > 1:
            raise click.UsageError("--num-answers goes without --connect")
        if self.num_logprobs is not None and not self.as_json and self.prompts_path is None:
            raise click.UsageError("--logprobs shows in the JSON lines only: add --json")
        if self.conversation.sampling.num_answers > 1 and self.conversation.tools.has_tools:
            raise click.UsageError("--num-answers goes without --tools and --mcp")
        self.conversation.sampling.sampler_parameters(GenerationConfig(), self.num_logprobs)  # checks --logprobs
        if (self.prompts_path is None) != (self.out_path is None):
            raise click.UsageError("--prompts and --out go together: give both")
        has_single_prompt = self._prompt_argument is not None or self.token_ids is not None
        if self.prompts_path is not None and (has_single_prompt or self.as_json or self.conversation.tools.has_tools):
            raise click.UsageError("--prompts goes without PROMPT, --token-ids, --json, --tools and --mcp")
        if self.token_ids is not None and (self._prompt_argument or self.conversation.system is not None):
            raise RequestError("--token-ids is the whole prompt: leave out PROMPT and --system")
        if self.is_raw and (self.conversation.tools.has_tools or self.conversation.sampling.needs_template):
            raise RequestError("--raw and --token-ids go without --tools, --mcp and options for thinking")
        if self.raw and self.conversation.system is not None:
            raise RequestError("--raw sends only PROMPT: leave out --system")

    @property
    def is_raw(self) -> bool:
        """Whether the prompt is sent without the chat template; its answer is then text and not parsed as a reply."""
        return self.raw or self.token_ids is not None

    @property
    def _prompt_argument(self) -> str | None:
        return self.prompt_text if self.prompt is None else self.prompt

    def read_prompt(self) -> str:
        """Return the text of standard input, if it is a pipe or a file, and PROMPT after it; '' for token ids.

        Raises:
            RequestError: there is no text.
        """
        if self.token_ids is not None:
            return ""
        argument = self._prompt_argument
        if argument is None or argument == STANDARD_INPUT:
            text = _standard_input()
        elif _is_piped():
            piped_text = _standard_input()
            text = "\n\n".join(part for part in (piped_text.rstrip(), argument) if part.strip())
        else:
            text = argument
        if not text.strip():
            raise RequestError("the prompt is empty: give some text")
        return text


def _is_piped() -> bool:
    """Return whether standard input is a file, a pipe or a socket."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError):  # closed
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def _standard_input() -> str:
    """Return the text of standard input.

    Raises:
        RequestError: it is a terminal, closed, unreadable, too long, or not UTF-8.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise RequestError("there is no prompt: give PROMPT, or write one to standard input")
    if _is_piped() and not select.select([sys.stdin], [], [], _SILENT_WAIT_S)[0]:
        log("reading standard input to its end; add < /dev/null if it has no text")
    try:
        return read_stream(sys.stdin.buffer).decode()
    except OSError as error:
        raise RequestError(f"the prompt cannot be read from standard input: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text: its byte {error.start} is not") from None
