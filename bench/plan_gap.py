"""Plan gap: the time from a sampled token's arrival to the next plan, while this process renders or tokenizes.

python -m bench.plan_gap [--save] [--tokens N]

A small program is at the other end of this process's pipes, instead of a guard. It sleeps STEP_S for each step and
"samples" the next token of a given text: a code block of 300 lines. It measures each gap itself, from before it writes
a token to when it has read the next plan, so that a gap includes two pipes, three threads of this process and
Python's lock. Cases:

- quiet: this process only reads the answer's events;
- rendering: the chat's screen renders the code block on a terminal, as it grows;
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
LINES = 300
PROMPT_TOKENS = 100_000
CODE = "```python\n" + "".join(f"value_{n} = compute(a[{n}], {n}.5)  # {n}\n" for n in range(LINES)) + "```\n"


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/plan_gap.csv")
    parser.add_argument("--tokens", type=int, default=3000, help="length of each answer  [default: 3000]")
    options = parser.parse_args()
    files = read_small_files(BUILTIN_FOLDER)
    tokenizer = load_tokenizer(files, describe_model(files, "built-in").config.vocab_size)
    conversation = Conversation(load_chat_template(files), tokenizer)
    cases: dict[str, tuple[Callable[[Handle], None], Callable[[threading.Event], None]]] = {
        "quiet": (read, wait),
        "rendering": (render, wait),
        "tokenizing": (read, lambda stop: tokenize(conversation, tokenizer, stop)),
    }
    rows = []
    for name, (reader, meanwhile) in cases.items():
        gaps = measure(tokenizer, options.tokens, reader, meanwhile)
        row = (name, len(gaps), *(f"{1000 * value:.3f}" for value in (statistics.median(gaps), p99(gaps), max(gaps))))
        print(f"{name}: {len(gaps)} gaps, median {row[2]} ms, p99 {row[3]} ms, longest {row[4]} ms", flush=True)
        rows.append(row)
    if options.save:
        print("saved to", save_rows("plan_gap", ("case", "gaps", "median_ms", "p99_ms", "longest_ms"), rows))


def measure(
    tokenizer: Tokenizer,
    num_tokens: int,
    reader: Callable[[Handle], None],
    meanwhile: Callable[[threading.Event], None],
) -> list[float]:
    """Return the gaps in seconds of one answer, read by ``reader`` while ``meanwhile`` runs on another thread."""
    ids = tokenizer.encode_text(CODE)
    request = Request((1, 2, 3), num_tokens, Sampling(seed=0), frozenset())
    with tempfile.TemporaryDirectory() as folder:
        text, result = Path(folder) / "ids.json", Path(folder) / "gaps.json"
        text.write_text(json.dumps((ids * (num_tokens // len(ids) + 1))[:num_tokens]))
        with engine_on_a_program(Path(folder), text, result) as engine:
            stop = threading.Event()
            thread = threading.Thread(target=meanwhile, args=[stop])
            thread.start()
            reader(engine.submit(request, ReplyPolicy(tokenizer, request)))
            stop.set()
            thread.join()
        return list(json.loads(result.read_text()))


@contextmanager
def engine_on_a_program(folder: Path, text: Path, result: Path) -> Iterator[Engine]:
    """Yield an engine over one stage: this file as a program."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\ncd {Path.cwd()}\nexec {sys.executable} -m bench.plan_gap program {text} {result}\n")
    script.chmod(0o755)
    with StageGroup([StageLocation(python=str(script))], lease_s=20.0, log=lambda _: None) as group:
        policy = StepPolicy([StageCost(SIZES, SPEED)])
        scheduler = Scheduler(SchedulerLimits(1, 10**6, 512, 1), policy)
        with Engine(Pipeline(group, scheduler, policy, 10**6), scheduler) as engine:
            yield engine


def read(handle: Handle) -> None:
    """Read all events."""
    for _ in handle.events():
        pass


def render(handle: Handle) -> None:
    """Show the answer on a terminal whose other end another thread reads."""
    master, slave = pty.openpty()
    drain = threading.Thread(target=_drain, args=[master], daemon=True)
    drain.start()
    with os.fdopen(slave, "w") as terminal, redirect_stdout(terminal):
        screen = RichScreen(show_thinking=True)
        for event in handle.events():
            for part in event.parts if isinstance(event, Token) else ():
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
    """Do nothing until the answer has ended."""
    stop.wait()


def tokenize(conversation: Conversation, tokenizer: Tokenizer, stop: threading.Event) -> None:
    """Render and tokenize a new prompt of PROMPT_TOKENS again and again."""
    ids = tokenizer.encode_text(CODE)
    number = 0
    while not stop.is_set():
        number += 1
        conversation.reset()
        conversation.add_user(f"{number}\n" + CODE * (PROMPT_TOKENS // len(ids)))
        conversation.prompt_ids()


def p99(values: list[float]) -> float:
    """Return the value that 99% of the values do not exceed."""
    return statistics.quantiles(values, n=100)[-1]


def stage_program(text: Path, result: Path) -> None:
    """Answer steps with the tokens of ``text``, and write the gaps to ``result`` at the end of the input."""
    ids = iter(json.loads(text.read_text()))
    gaps: list[float] = []
    sent_at: float | None = None
    with os.fdopen(os.dup(1), "wb") as outward:
        outward.write(MARK)
        outward.flush()
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            now = time.perf_counter()
            if frame.kind is Kind.HEARTBEAT:
                status = StageStatus(PhaseUpdate(Phase.IDLE), 0.0)
                outward.write(encode_frame(Kind.HEARTBEAT, frame.payload))
                outward.write(encode_frame(Kind.STAGE_STATUS, status.to_json()))
                outward.flush()
            if frame.kind is not Kind.MESSAGE:
                continue
            message = decode_to_stage(frame.payload)
            if not isinstance(message, Step):
                break
            if sent_at is not None:
                gaps.append(now - sent_at)
            time.sleep(STEP_S)
            tokens = tuple(SampledToken(next(ids)) for row in message.rows if row.needs_logits)
            data = encode_frame(Kind.MESSAGE, encode_message(StepDone(message.number, STEP_S, tokens=tokens)))
            sent_at = time.perf_counter()
            outward.write(data)
            outward.flush()
    result.write_text(json.dumps(gaps))


if __name__ == "__main__":
    match sys.argv[1:2]:
        case ["program"]:
            stage_program(Path(sys.argv[2]), Path(sys.argv[3]))
        case _:
            main()
