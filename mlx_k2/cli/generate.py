"""`mlx-k2 generate`: the answer to one prompt, streamed to stdout, or the answers to a file of prompts."""

from collections.abc import Iterator

import click
import msgspec

from mlx_k2.chat.chat_events import Event
from mlx_k2.chat.chat_session import ChatSession, ReplySettings, reply_events
from mlx_k2.chat.completion import submissions_for
from mlx_k2.chat.next_prompt import ReplySource
from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.connect import connect_option, remote_engine
from mlx_k2.cli.console import log, opening_lines, show_dry_run
from mlx_k2.cli.generate_file import MAX_SLOTS, generate_many
from mlx_k2.cli.generate_options import GenerateOptions
from mlx_k2.cli.option_values import Numbers, with_struct
from mlx_k2.cli.options import (
    answer_options,
    cluster_options,
    draft_option,
    run_options,
    sampling_options,
    tool_options,
)
from mlx_k2.cli.output import JsonOutput, TextOutput, show_answers
from mlx_k2.cli.program_command import ProgramCommand
from mlx_k2.cli.repl.keyboard import LineKeyboard
from mlx_k2.cli.repl.screen import Screen
from mlx_k2.cli.repl.tool_approval import ToolApproval
from mlx_k2.cli.started_cluster import frontend_before_start, prepare_request, started_cluster
from mlx_k2.cli.started_tools import started_tools
from mlx_k2.client.remote_engine import RemoteEngine
from mlx_k2.coordinator.answer_summary import AnswerSummary, total
from mlx_k2.coordinator.engine import Engine, engine_on
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.deployment.cluster_options import DeploymentRequest, open_source
from mlx_k2.deployment.dry_run import preview
from mlx_k2.deployment.restarting import RestartingDeployment
from mlx_k2.errors import CheckpointError, DownloadError
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.known_layout import known_layout
from mlx_k2.weights.model_frontend import ModelFrontend


@click.command(cls=ProgramCommand)
@click.argument("prompt", required=False)
@click.option("--prompt", "-p", "prompt_text", metavar="TEXT", help="The same as PROMPT; - reads standard input.")
@cluster_options
@connect_option
@click.option("--raw", is_flag=True, help="Send PROMPT without the chat template.")
@click.option("--token-ids", type=Numbers(0, "3,4,5"), help="The prompt as token ids, sent without the chat template.")
@sampling_options
@answer_options
@click.option(
    "--prompts",
    "prompts_path",
    metavar="FILE",
    help="A file of many prompts, one JSON object a line (docs/json.md); - reads standard input.",
)
@click.option(
    "--out",
    "out_path",
    metavar="FILE",
    help="With --prompts: the file for the results. The same command, run again, adds the missing results.",
)
@draft_option
@run_options
@tool_options
@click.option(
    "--logprobs",
    "num_logprobs",
    type=int,
    metavar="N",
    help="With --json or --prompts: the log-probabilities of each sampled token and of the N most likely tokens.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: each token, then a summary.")
@click.option("--dry-run", is_flag=True, help="Show hosts, layers, bytes and files; start nothing.")
@with_struct(GenerateOptions)
def command(options: GenerateOptions) -> None:
    """Answer PROMPT, or the text of standard input; with both, the text comes first and PROMPT after it.

    \b
    On this machine, with the small built-in model on two stages:
        mlx-k2 generate "Hello"

    \b
    About a text:
        cat letter.txt | mlx-k2 generate "Summarise this letter."

    \b
    On two Macs, each of which loads its share of the layers:
        mlx-k2 generate --hostfile two-macs.json --model ~/Kimi-K2-Thinking "Hello"

    \b
    Show the plan without starting anything:
        mlx-k2 generate --hostfile two-macs.json --model ~/Kimi-K2-Thinking --dry-run

    The answer goes to stdout as it is sampled, everything else to stderr: thinking, tool calls, counts and times. The
    exit code is 2 for an error before anything was started, 1 for a later error, 130 after Ctrl-C.
    """  # noqa: D301  # click reads the escape
    if options.connect is not None:
        _generate_on_server(options)
        return
    num_sequences = MAX_SLOTS if options.prompts_path is not None else options.conversation.sampling.num_answers
    num_slots = min(num_sequences, MAX_SLOTS)
    request = prepare_request(options.cluster, options.draft_mode, num_slots)
    if options.dry_run:
        _dry_run(request)
        return
    request, model = open_source(request)
    if options.prompts_path is not None:
        generate_many(options, request, model)
    else:
        _generate_on_stages(options, request, model)


def _dry_run(request: DeploymentRequest) -> None:
    """Show the plan for the model. Without Kimi K2 Thinking's files here, use the layout that this package has."""
    model: ModelDescription | None
    try:
        request, model = open_source(request, must_be_here=True)
    except CheckpointError as error:
        raise CheckpointError(f"a dry run reads the model on this machine: {error}") from None
    except DownloadError as error:
        model = known_layout(request.source)
        if model is None:
            raise
        log(str(error))
        log(f"this plan uses the layout of {request.source.path_or_repo} that mlx-k2 has built in")
    assert model is not None
    show_dry_run(request, model, *preview(request, model))


def _generate_on_stages(options: GenerateOptions, request: DeploymentRequest, model: ModelDescription | None) -> None:
    """Answer with the model on new stages. Raise errors of the request before any stage is started, if possible."""
    text = options.read_prompt()
    frontend = frontend_before_start(request, model)
    if frontend is not None:
        first_submissions(options, text, frontend)  # checks the prompt
    with started_tools(options.conversation.tools) as tools:
        if frontend is not None:
            options.conversation.settings(frontend, tools)  # checks --tool-choice
        with started_cluster(request, model, options.run, verbose=options.verbose) as (stages, frontend):
            for line in opening_lines(options.cluster, frontend, is_raw=options.is_raw):
                log(line)
            with engine_on(
                stages.deployment, draft_mode=options.draft_mode, on_report=stages.on_report, restarts=stages
            ) as engine:
                _answer(options, engine, frontend, text, tools, stages)


def _generate_on_server(options: GenerateOptions) -> None:
    """Answer with the model of a running server."""
    assert options.connect is not None
    url, options = options.connect, msgspec.structs.replace(options, conversation=options.conversation.for_server())
    text, engine = options.read_prompt(), remote_engine(url)
    first_submissions(options, text, engine.frontend)  # checks the prompt
    with started_tools(options.conversation.tools) as tools:
        _answer(options, engine, engine.frontend, text, tools)


def _answer(
    options: GenerateOptions,
    engine: Engine | RemoteEngine,
    frontend: ModelFrontend,
    text: str,
    tools: Tools | None,
    stages: RestartingDeployment | None = None,
) -> None:
    """Show each event of the answer at once, then its counts and times. Show each of several answers at its end."""
    settings = options.conversation.settings(frontend, tools, options.num_logprobs)
    output: JsonOutput | TextOutput
    if options.as_json:
        output = JsonOutput(frontend.tokenizer)
    else:
        output = TextOutput(show_thinking=not options.hide_thinking, verbose=options.verbose)
    output.show_waiting("reading the prompt")
    try:
        for line in settings.warnings:
            log(line)
        if options.conversation.sampling.num_answers > 1 and isinstance(engine, Engine):  # refused with --connect
            submissions = first_submissions(options, text, frontend)
            show_answers(engine, frontend.tokenizer, submissions, as_json=options.as_json)
            return
        summaries = []
        for event in _events(options, engine, frontend, settings, text, tools, output):
            output.show_event(event)
            if isinstance(event, AnswerSummary):
                summaries.append(event)
        deployment = None if stages is None else stages.deployment
        output.write_summary(total(summaries), deployment, engine.use if isinstance(engine, Engine) else ())
    finally:
        output.pause()


def _events(
    options: GenerateOptions,
    engine: ReplySource,
    frontend: ModelFrontend,
    settings: ReplySettings,
    text: str,
    tools: Tools | None,
    screen: Screen,
) -> Iterator[Event]:
    """Return the events of the answer to a raw prompt, or to the first message of a conversation."""
    if options.is_raw:
        (submission,) = first_submissions(options, text, frontend)
        return reply_events(engine.submit(submission.request, submission.policy))
    tool_options = options.conversation.tools
    approval = ToolApproval(screen, LineKeyboard(), tool_options.allowed_tools, allows_all=tool_options.yes)
    conversation = options.conversation.begin(frontend, tools)
    session = ChatSession(engine, frontend.tokenizer, conversation, settings, tools, approval)
    return session.send_message(text)


def first_submissions(options: GenerateOptions, text: str, frontend: ModelFrontend) -> list[Submission]:
    """Return the requests for the first reply, one for each of --num-answers, without the declarations of tools.

    With --tools they only check the prompt, and `ChatSession` makes the request.

    Raises:
        RequestError, TokenizerError: the prompt cannot be rendered or does not fit, or an option cannot be used.
    """
    if options.token_ids is not None:
        prompt_ids = list(options.token_ids)
    elif options.raw:
        prompt_ids = frontend.tokenizer.encode_text(text)
    else:
        conversation = options.conversation.begin(frontend, None)
        conversation.add_user(text)
        prompt_ids = conversation.prompt_ids()
    settings = options.conversation.settings(frontend, num_logprobs=options.num_logprobs)
    num_answers = options.conversation.sampling.num_answers
    return submissions_for(settings, frontend, prompt_ids, num_answers, is_raw=options.is_raw)
