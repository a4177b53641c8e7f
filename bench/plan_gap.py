"""Measurement of the plan gap: the time from a sampled token to the next plan, while this process renders or tokenizes.

python -m bench.plan_gap [--save] [--tokens N]

In place of a guard and its stage, a small program (`stage_program`) is at the other end of this process's pipes. It
sleeps STEP_S for each step, and then sends the next token of a fixed text, a code block of 300 lines, repeated. The
program measures each gap, from before it writes a token to after it has read the next plan. A gap thus includes two
pipes, and this process's threads for reading, scheduling and writing, which wait for the GIL. Cases:

- quiet: this process only reads the answer's events;
- rendering: the chat's screen renders the growing answer on a terminal;
- tokenizing: another thread renders and tokenizes a prompt of 100,000 tokens, again and again.

--save appends the rows to results/plan_gap.csv.
"""

import argparse
import json
import os
import pty
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

from bench.measure import save_rows
from mlx_k2.builtin import BUILTIN_FOLDER
from mlx_k2.chat.conversation import Conversation
from mlx_k2.cli.repl.screen import RichScreen
from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Handle, Token
from mlx_k2.coordinator.pipeline import Pipeline
from mlx_k2.coordinator.reply_policy import ReplyPolicy
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.protocol.framing import MARK, Kind, encode_frame, read_frame
from mlx_k2.protocol.guard_messages import Phase, PhaseUpdate, StageStatus
from mlx_k2.protocol.messages import Step, StepDone, decode_to_stage, encode_message
from mlx_k2.sampling import SampledToken, Sampling
from mlx_k2.scheduling.cost_model import StageCost
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy
from mlx_k2.testing.sleeping_stages import SIZES, SPEED
from mlx_k2.text.chat_template import load_chat_template
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from mlx_k2.weights.checkpoint import describe_model, read_small_files

STEP_S = 0.01
NUM_LINES = 300
NUM_PROMPT_TOKENS = 100_000
CODE = "```python\n" + "".join(f"value_{n} = compute(a[{n}], {n}.5)  # {n}\n" for n in range(NUM_LINES)) + "```\n"

Reader = Callable[[Handle], None]
"""Function that reads the events of an answer to its end."""
BackgroundTask = Callable[[threading.Event], None]
"""Function that works until the event is set."""


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/plan_gap.csv")
    parser.add_argument("--tokens", type=int, default=3000, help="length of each answer  [default: 3000]")
    options = parser.parse_args()
    files = read_small_files(BUILTIN_FOLDER)
    tokenizer = load_tokenizer(files, describe_model(files, "built-in").config.vocab_size)
    conversation = Conversation(load_chat_template(files), tokenizer)
    cases: dict[str, tuple[Reader, BackgroundTask]] = {
        "quiet": (read_events, wait),
        "rendering": (render, wait),
        "tokenizing": (read_events, partial(tokenize, conversation, tokenizer)),
    }
    rows = []
    for name, (reader, task) in cases.items():
        gaps_ms = [1000 * gap_s for gap_s in measure(tokenizer, options.tokens, reader, task)]
        median, p99 = statistics.median(gaps_ms), statistics.quantiles(gaps_ms, n=100)[98]
        times = [f"{time_ms:.3f}" for time_ms in (median, p99, max(gaps_ms))]
        row = (name, len(gaps_ms), *times)
        print("{}: {} gaps, median {} ms, p99 {} ms, longest {} ms".format(*row), flush=True)
        rows.append(row)
    if options.save:
        print("saved to", save_rows("plan_gap", ("case", "gaps", "median_ms", "p99_ms", "longest_ms"), rows))


def measure(tokenizer: Tokenizer, num_tokens: int, reader: Reader, task: BackgroundTask) -> list[float]:
    """Return the gaps in seconds of one answer, read by ``reader`` while ``task`` runs on another thread."""
    code_ids = tokenizer.encode_text(CODE)
    request = Request(prompt_ids=(1, 2, 3), max_tokens=num_tokens, sampling=Sampling(seed=0), stop_ids=frozenset())
    with tempfile.TemporaryDirectory() as folder:
        ids_file, gaps_file = Path(folder) / "ids.json", Path(folder) / "gaps.json"
        ids_file.write_text(json.dumps((code_ids * (num_tokens // len(code_ids) + 1))[:num_tokens]))
        with engine_on_program(Path(folder), ids_file, gaps_file) as engine:
            stop = threading.Event()
            thread = threading.Thread(target=task, args=[stop])
            thread.start()
            try:
                reader(engine.submit(request, ReplyPolicy(tokenizer, request)))
            finally:
                stop.set()
                thread.join()
        return list(json.loads(gaps_file.read_text()))  # written at the end of the program, which the context has ended


@contextmanager
def engine_on_program(folder: Path, ids_file: Path, gaps_file: Path) -> Iterator[Engine]:
    """Yield an engine whose single stage is `stage_program` in a process. ``folder`` gets the script that starts it.

    The script runs in place of the host's Python, and ignores the arguments that would start a guard.
    """
    script = folder / "python"
    command = f"{sys.executable} -m bench.plan_gap program {ids_file} {gaps_file}"
    script.write_text(f"#!/bin/sh\ncd {Path.cwd()}\nexec {command}\n")
    script.chmod(0o755)
    with StageGroup([StageLocation(python=str(script))], lease_s=20.0, log=lambda _: None) as group:
        policy = StepPolicy([StageCost(SIZES, SPEED)])
        limits = SchedulerLimits(num_slots=1, context_tokens=10**6, chunk_tokens=512, num_stages=1)
        scheduler = Scheduler(limits, policy)
        with Engine(Pipeline(group, scheduler, policy, vocab_size=10**6), scheduler) as engine:
            yield engine


def read_events(handle: Handle) -> None:
    """Read the answer's events and drop them."""
    for _ in handle.events():
        pass


def render(handle: Handle) -> None:
    """Show the answer on a terminal. A thread reads the terminal's other end."""
    master, slave = pty.openpty()
    drain = threading.Thread(target=_drain, args=[master], daemon=True)
    drain.start()
    with os.fdopen(slave, "w") as terminal, redirect_stdout(terminal):
        screen = RichScreen(show_thinking=True)
        for event in handle.events():
            if isinstance(event, Token):
                for part in event.parts:
                    screen.show_event(part)
        screen.pause()
    os.close(master)


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:  # the terminal is closed
        return


def wait(stop: threading.Event) -> None:
    """Wait for ``stop``."""
    stop.wait()


def tokenize(conversation: Conversation, tokenizer: Tokenizer, stop: threading.Event) -> None:
    """Render and tokenize prompts of about NUM_PROMPT_TOKENS tokens, each different, until ``stop`` is set."""
    long_text = CODE * (NUM_PROMPT_TOKENS // len(tokenizer.encode_text(CODE)))
    number = 0
    while not stop.is_set():
        number += 1
        conversation.reset()
        conversation.add_user(f"{number}\n{long_text}")
        conversation.prompt_ids()


def stage_program(ids_file: Path, gaps_file: Path) -> None:
    """Answer the step plans on stdin with the ids in ``ids_file``; at Stop or the end of stdin write ``gaps_file``."""
    ids = iter(json.loads(ids_file.read_text()))
    gaps: list[float] = []
    sent_at: float | None = None
    with os.fdopen(os.dup(1), "wb") as stdout:
        stdout.write(MARK)
        stdout.flush()
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            now = time.perf_counter()
            if frame.kind is Kind.HEARTBEAT:
                status = StageStatus(PhaseUpdate(Phase.IDLE), 0.0)
                stdout.write(encode_frame(Kind.HEARTBEAT, frame.payload))
                stdout.write(encode_frame(Kind.STAGE_STATUS, status.to_json()))
                stdout.flush()
            if frame.kind is not Kind.MESSAGE:
                continue
            message = decode_to_stage(frame.payload)
            if not isinstance(message, Step):  # Stop
                break
            if sent_at is not None:
                gaps.append(now - sent_at)
            time.sleep(STEP_S)
            tokens = tuple(SampledToken(next(ids)) for row in message.rows if row.needs_logits)
            answer = encode_frame(Kind.MESSAGE, encode_message(StepDone(message.number, STEP_S, tokens=tokens)))
            sent_at = time.perf_counter()
            stdout.write(answer)
            stdout.flush()
    gaps_file.write_text(json.dumps(gaps))


if __name__ == "__main__":
    if sys.argv[1:2] == ["program"]:
        stage_program(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
