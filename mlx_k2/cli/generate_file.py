"""`mlx-k2 generate --prompts`: a file with the results of a file of prompts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import msgspec
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlx_k2.chat.completion import encode_prompt, submissions_for
from mlx_k2.chat.sampling_options import MAX_ANSWERS, reply_settings
from mlx_k2.cli.console import console, log, log_restart, opening_lines
from mlx_k2.cli.generate_options import GenerateOptions
from mlx_k2.cli.output import answer_fields
from mlx_k2.cli.prompt_files import PromptLine, read_prompt_lines, result_digest
from mlx_k2.cli.result_file import ResultFile
from mlx_k2.cli.started_cluster import StartedCluster, frontend_before_start, started_cluster
from mlx_k2.coordinator.batch_results import BatchResult, answer_all
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.deployment.cluster_options import DeploymentRequest
from mlx_k2.errors import SetupError
from mlx_k2.sampling import derived_seed
from mlx_k2.text.chat_template import ChatTemplate
from mlx_k2.text.history_reader import read_history
from mlx_k2.text.message import Message, num_calls
from mlx_k2.weights.checkpoint import ModelDescription
from mlx_k2.weights.model_frontend import ModelFrontend

MAX_SLOTS = 16
"""Maximum number of concurrent sequences. By the cost model, more would raise K2's throughput by little."""


def generate_many(options: GenerateOptions, request: DeploymentRequest, model: ModelDescription | None) -> None:
    """Answer every line of --prompts that has no result in --out yet.

    Raises:
        RequestError: a file is malformed or belongs to another run. No stage was started, unless only the first host
            has the model.
        click.exceptions.Exit: a line failed.
    """
    assert options.prompts_path is not None and options.out_path is not None  # GenerateOptions requires both
    lines = read_prompt_lines(options.prompts_path, options.conversation.sampling)
    with ResultFile(Path(options.out_path)) as results:
        if model is not None and (frontend := frontend_before_start(request, model)) is not None:
            _check_options(options, frontend)
            results.resume(result_digests(options, model, lines))
        if len(results) < len(lines):
            with started_cluster(request, model, options.run, verbose=options.verbose) as cluster:
                if model is None:
                    results.resume(result_digests(options, cluster.stages.deployment.model, lines))
                _Batch(options, cluster, lines, results).run()
        num_failed = len(lines) - len(results)
        results.sort()
    log(f"{len(lines)} results are in {options.out_path}" + (f", {num_failed} of them failed" if num_failed else ""))
    if num_failed:
        raise click.exceptions.Exit(1)


def _check_options(options: GenerateOptions, frontend: ModelFrontend) -> None:
    """Raise RequestError if every line would be refused with these options."""
    sampling = options.conversation.sampling
    if not options.raw:
        sampling.mode.variables(frontend.template)  # raises if the template lacks the mode of thinking
    sampling = msgspec.structs.replace(sampling, tool_choice=None)  # each line has its own tools
    settings = reply_settings(sampling, frontend, num_logprobs=options.num_logprobs)
    settings.request(frontend.tokenizer, [0])  # raises if even the shortest prompt is refused


def result_digests(
    options: GenerateOptions, model: ModelDescription, lines: Mapping[int, PromptLine]
) -> dict[str, int]:
    """Return the number of each line by the digest of what its result depends on: model, options and line."""
    cluster, conversation = options.cluster, options.conversation
    run = (
        model.digest,
        conversation.system,
        options.raw,
        conversation.sampling,
        cluster.context_tokens,
        cluster.dtype,
        cluster.dense_bits,
        options.num_logprobs,
    )
    return {result_digest(run, number, line): number for number, line in lines.items()}


@dataclass
class _Batch:
    """One run over the lines that have no result. Answers are kept until all answers of their line are complete."""

    _options: GenerateOptions
    _cluster: StartedCluster
    _lines: Mapping[int, PromptLine]
    _results: ResultFile
    _warnings: set[str] = field(default_factory=set)
    _num_answers: dict[int, int] = field(default_factory=dict)  # by the number of the line
    _answers: dict[int, dict[int, BatchResult]] = field(default_factory=dict)  # by line number and index

    def run(self) -> None:
        """Write a result for each line."""
        for text in opening_lines(self._options.cluster, self._cluster.frontend, is_raw=self._options.raw):
            log(text)
        stages = self._cluster.stages
        engine = engine_on(
            stages.deployment,
            draft_mode=self._options.draft_mode,
            prompts_first=True,  # more tokens per second in total
            on_report=stages.on_report,
            restarts=stages,
            on_restart=log_restart,
        )
        with _progress(len(self._lines), len(self._results)) as self._bar, engine:
            for result in answer_all(engine, self._requests()):
                self._add(result)

    def _requests(self) -> Iterator[tuple[int, Submission]]:
        """Yield the requests of all lines, each with its key: MAX_ANSWERS * line number + index of the answer.

        Write an error for each line without valid requests.
        """
        base_seed = self._options.conversation.sampling.base_seed
        for number, line in self._lines.items():
            if number in self._results:
                continue
            try:
                seed = derived_seed(base_seed, number - 1)
                submissions, warnings = line_submissions(self._options, line, seed, self._cluster.frontend)
            except SetupError as error:
                self._write(number, {"error": str(error)})
            else:
                for text in set(warnings) - self._warnings:
                    log(text)
                self._warnings.update(warnings)
                self._num_answers[number] = len(submissions)
                yield from enumerate(submissions, start=MAX_ANSWERS * number)

    def _add(self, result: BatchResult) -> None:
        """Add an answer. Write the result of its line if that was the last answer of the line."""
        number, index = divmod(result.key, MAX_ANSWERS)
        answers = self._answers.setdefault(number, {})
        answers[index] = result
        if len(answers) == self._num_answers[number]:
            del self._answers[number]
            self._write(number, self._fields(number, [answers[index] for index in sorted(answers)]))

    def _fields(self, number: int, answers: Sequence[BatchResult]) -> dict[str, object]:
        """Return the fields of a line's result: the fields of its answer, a list of its answers, or the first error."""
        for answer in answers:
            if answer.error is not None:
                return {"error": answer.error}
        messages, num_calls_before, left_out = self._lines[number].messages, 0, {}
        if messages is not None:
            history = read_history(messages, self._cluster.frontend.template.fields)
            num_calls_before = num_calls(history.messages)
            left_out = {"left_out": history.left_out} if history.left_out else {}
        fields = [
            answer_fields(self._cluster.frontend.tokenizer, answer, num_calls_before) | left_out for answer in answers
        ]
        return fields[0] if len(fields) == 1 else {"answers": fields}

    def _write(self, number: int, fields: Mapping[str, object]) -> None:
        line_id = self._lines[number].id
        self._results.write(number, {"id": number if line_id is None else line_id, **fields})
        self._bar.advance(self._bar.task_ids[0])


def line_submissions(
    options: GenerateOptions, line: PromptLine, seed: int, frontend: ModelFrontend
) -> tuple[list[Submission], tuple[str, ...]]:
    """Return the requests for one line, one for each answer, and warnings about its schemas.

    A seed in the line overrides ``seed``.

    Raises:
        RequestError, TokenizerError: the prompt cannot be rendered or does not fit, or an option cannot be used.
    """
    sampling = line if line.seed is not None else msgspec.structs.replace(line, seed=seed)
    tools = line.tools or ()
    is_raw = options.raw and line.prompt is not None
    if is_raw and line.prompt is not None:
        prompt_ids = frontend.tokenizer.encode_text(line.prompt)
    else:
        messages = _messages(options.conversation.system, line, frontend.template)
        prompt_ids = encode_prompt(frontend, messages, sampling, tools)
    settings = reply_settings(sampling, frontend, tools, num_logprobs=options.num_logprobs)
    return submissions_for(settings, frontend, prompt_ids, sampling.num_answers, is_raw=is_raw), settings.warnings


def _messages(system: str | None, line: PromptLine, template: ChatTemplate) -> list[Message]:
    if line.messages is not None:
        return read_history(line.messages, template.fields).messages
    assert line.prompt is not None, "a line without a prompt"
    system_messages = [] if system is None else [Message(role="system", content=system)]
    return [*system_messages, Message(role="user", content=line.prompt)]


def _progress(total: int, completed: int) -> Progress:
    """Return a progress bar on stderr, which is disabled if stderr is not a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    progress.add_task("prompts", total=total, completed=completed)
    return progress
