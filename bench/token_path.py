"""Counter of the files of mlx_k2 that run for one decoded token in the coordinator, in a stage and in a guard.

    python -m bench.token_path [--python PATH] [--terminal | --chat]

The script runs `mlx-k2 generate` of the Python at PATH on two local stages, with the built-in model and drafts on, and
records which lines run in each process (bench/line_recorder.py). It does not import mlx_k2, so it can measure any
commit. With --terminal stdout is a terminal. With --chat the command is `mlx-k2 chat` on a terminal, which formats the
answer as Markdown.

A file counts for a process if lines of it run in at least a quarter of the process's windows. A window is

- in the coordinator: from the last StepDone with a token before a flush of stdout with text to that flush,
- in a stage and in its guard: from the arrival of a step plan to the write of its StepDone.

The first window of a process belongs to the prompt and is not counted. Neither are threads named "heartbeat", nor the
threads of a guard that do not read or write frames: they run on timers, so that their files depend on the machine's
load. The count of the stages, and that of the guards, is the union over both processes.

The measured program must have a function ``read_frame`` that returns a frame with a ``payload``. Its messages must be
msgpack maps with the class name under "type": "StepDone" for the answer, another name that begins with "Step" for the
plan. A stage must answer plans in the order in which they arrive.
"""

import argparse
import enum
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from bench.line_recorder import FOLDER_VARIABLE, PACKAGE_VARIABLE

RECORDER = Path(__file__).with_name("line_recorder.py")
PROMPT = "Count to 20."
"""The built-in model's answer is longer than MAX_TOKENS, and some of its drafts are accepted, others rejected."""
MAX_TOKENS = 64
NUM_STAGES = 2
RUN_TIMEOUT_S = 180.0
EXIT_TIMEOUT_S = 20.0
MIN_WINDOWS = 8
MIN_FRACTION = 0.25
"""A file counts if it runs in this fraction of a process's windows."""


class Mode(enum.Enum):
    """Command of the measured program, and the type of its stdout."""

    PIPE = "generate, stdout is a pipe"
    TERMINAL = "generate, stdout is a terminal"
    CHAT = "chat, stdout is a terminal"


class Role(enum.Enum):
    """Kind of a process. The value describes its window."""

    COORDINATOR = "StepDone to stdout"
    STAGE = "step plan to StepDone"
    GUARD = "step plan to StepDone, relayed"


NUM_PROCESSES = {Role.COORDINATOR: 1, Role.STAGE: NUM_STAGES, Role.GUARD: NUM_STAGES}


class Event(NamedTuple):
    """One event of a process, as bench/line_recorder.py describes it."""

    kind: str
    thread: int
    detail: str


class Window(NamedTuple):
    """Range of events: indices ``start`` to ``end`` - 1."""

    start: int
    end: int


@dataclass(frozen=True)
class Arrival:
    """Arrival of a step plan or a StepDone. ``index`` is the number of the event at which its first bytes were read."""

    index: int
    message: dict[str, Any]

    @property
    def is_answer(self) -> bool:
        """True for a StepDone, False for a step plan."""
        return bool(self.message["type"] == "StepDone")

    @property
    def has_token(self) -> bool:
        """True for a StepDone with a sampled token, which only the last stage sends.

        Its tokens are the only list in it. The name of that field differs between commits.
        """
        return self.is_answer and any(isinstance(value, list) and value for value in self.message.values())


@dataclass(frozen=True)
class Process:
    """One process of the measured program, with the files that ran in each of its windows."""

    role: Role
    files_by_window: list[set[str]]


def main() -> None:
    """Run the program; print the counts and the files."""
    options = read_options()
    python = options.python.absolute()  # not resolve(): the Python of a virtual environment is a symbolic link
    started_at = time.monotonic()
    package = package_folder(python)
    processes = measure(python, package, options.mode)
    elapsed_s = time.monotonic() - started_at
    print(f"{package}: {options.mode.value}, {NUM_STAGES} stages, drafts on, {elapsed_s:.0f} s")
    for role in Role:
        print_files(role, [process for process in processes if process.role is role])


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="Python whose mlx_k2 is measured")
    modes = parser.add_mutually_exclusive_group()
    modes.set_defaults(mode=Mode.PIPE)
    modes.add_argument("--terminal", dest="mode", action="store_const", const=Mode.TERMINAL, help=Mode.TERMINAL.value)
    modes.add_argument("--chat", dest="mode", action="store_const", const=Mode.CHAT, help=Mode.CHAT.value)
    return parser.parse_args()


def package_folder(python: Path) -> Path:
    """Return the folder of the mlx_k2 that ``python`` imports, without an import of it."""
    script = "import importlib.util; print(importlib.util.find_spec('mlx_k2').submodule_search_locations[0])"
    completed = subprocess.run([str(python), "-P", "-c", script], capture_output=True, check=False, text=True)
    if completed.returncode != 0:
        sys.exit(f"{python} finds no package mlx_k2: give --python the Python of an environment that has it")
    return Path(completed.stdout.strip())


# ---- running the program


def measure(python: Path, package: Path, mode: Mode) -> list[Process]:
    """Run the program once; return its processes with the recorded files."""
    with tempfile.TemporaryDirectory(prefix="token-path-") as folder_name:
        folder = Path(folder_name)
        (folder / "sitecustomize.py").write_text(RECORDER.read_text())
        (folder / "prompt").write_text(f"{PROMPT}\n")
        variables = {PACKAGE_VARIABLE: str(package), FOLDER_VARIABLE: folder_name, "PYTHONPATH": folder_name}
        environment = {**os.environ, **variables, "TERM": "xterm-256color"}
        environment.pop("NO_COLOR", None)  # chat does not format Markdown if it is set
        output = run_program(command_line(python, mode), folder, environment, terminal=mode is not Mode.PIPE)
        processes = [process for path in folder.glob("*.json") if (process := read_process(path)) is not None]
    check(processes, output)
    return processes


def command_line(python: Path, mode: Mode) -> list[str]:
    """Return the command of the measured program. ``chat`` gets the prompt on stdin, ``generate`` as an argument."""
    settings = ["--stages", str(NUM_STAGES), "--max-tokens", str(MAX_TOKENS), "--seed", "1", "--temperature", "0"]
    arguments = ["chat", *settings] if mode is Mode.CHAT else ["generate", *settings, PROMPT]
    return [str(python), str(python.with_name("mlx-k2")), *arguments]


def run_program(command: Sequence[str], folder: Path, environment: dict[str, str], *, terminal: bool) -> str:
    """Run ``command`` to its end, with a terminal or a pipe as stdout and stderr; return its output.

    Exit with a message if the command fails.
    """
    reader, writer = os.openpty() if terminal else os.pipe()
    with (folder / "prompt").open() as prompt:
        process = subprocess.Popen(
            command, stdin=prompt, stdout=writer, stderr=writer, cwd=folder, env=environment, start_new_session=True
        )
    os.close(writer)
    try:
        output = read_to_end(reader, time.monotonic() + RUN_TIMEOUT_S)
    finally:
        os.close(reader)
        exit_code = wait_or_stop(process)
    if exit_code != 0:
        sys.exit(f"{' '.join(command)} ended with exit code {exit_code}:\n{output}")
    return output


def read_to_end(descriptor: int, deadline: float) -> str:
    """Read until all writers have closed their end, or until ``deadline``, a value of time.monotonic()."""
    chunks = []
    while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
        try:
            chunk = os.read(descriptor, 65536)
        except OSError:  # Linux reports the end of a terminal as an error
            break
        if not chunk:
            break
        chunks.append(chunk)
    return b"".join(chunks).decode(errors="replace")


def wait_or_stop(process: subprocess.Popen[bytes]) -> int:
    """Wait for the process, stop it after EXIT_TIMEOUT_S, and return its exit code. Its stages end with it."""
    for stop in (process.terminate, process.kill):
        try:
            return process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            stop()
    return process.wait(EXIT_TIMEOUT_S)


def check(processes: Sequence[Process], output: str) -> None:
    """Exit with a message unless all processes were recorded, each with enough windows."""
    for role, expected in NUM_PROCESSES.items():
        counts = [len(process.files_by_window) for process in processes if process.role is role]
        if len(counts) != expected or min(counts) < MIN_WINDOWS:
            sys.exit(
                f"expected {expected} x {role.name.lower()} with {MIN_WINDOWS} windows or more, recorded {counts}: "
                f"--help has the requirements on the measured program. Its output:\n{output}"
            )


# ---- files of the windows


def read_process(path: Path) -> Process | None:
    """Read the recorded events of one process. Return None if it read no step plan and no StepDone."""
    events = [Event(*fields) for fields in json.loads(path.read_bytes())]
    arrivals = list(find_arrivals(events))
    role = role_of(arrivals)
    if role is None:
        return None
    windows = coordinator_windows(events, arrivals) if role is Role.COORDINATOR else plan_windows(events, arrivals)
    threads = io_threads(events) if role is Role.GUARD else {event.thread for event in events}
    return Process(role, [files_in(events[start:end], threads) for start, end in windows[1:]])


def role_of(arrivals: Sequence[Arrival]) -> Role | None:
    """Return the role of a process: a coordinator reads StepDone, a stage reads plans, a guard reads both."""
    reads_answers = any(arrival.is_answer for arrival in arrivals)
    reads_plans = any(not arrival.is_answer for arrival in arrivals)
    if reads_answers:
        return Role.GUARD if reads_plans else Role.COORDINATOR
    return Role.STAGE if reads_plans else None


def find_arrivals(events: Sequence[Event]) -> Iterator[Arrival]:
    """Yield the messages in the order in which they were read to their end."""
    first_reads: dict[int, int] = {}
    for index, event in enumerate(events):
        match event.kind:
            case "enter":  # read_frame was called: the next read is the first of a frame
                first_reads.pop(event.thread, None)
            case "read":
                first_reads.setdefault(event.thread, index)
            case "frame":
                message = msgspec.msgpack.decode(bytes.fromhex(event.detail))
                yield Arrival(first_reads.get(event.thread, index), message)


def coordinator_windows(events: Sequence[Event], arrivals: Sequence[Arrival]) -> list[Window]:
    """Return for each write to stdout the window from the last token that arrived after the previous write."""
    tokens = [arrival.index for arrival in arrivals if arrival.has_token]
    windows = []
    previous = -1
    for index, event in enumerate(events):
        if event.kind == "stdout":
            new_tokens = [token for token in tokens if previous < token < index]
            if new_tokens:
                windows.append(Window(new_tokens[-1], index))
            previous = index
    return windows


def plan_windows(events: Sequence[Event], arrivals: Sequence[Arrival]) -> list[Window]:
    """Return for each step plan the window to the write of its StepDone. The n-th answer belongs to the n-th plan."""
    plans = [arrival.index for arrival in arrivals if not arrival.is_answer]
    return [Window(plan, answer) for plan, answer in zip(plans, answer_writes(events), strict=False)]


def answer_writes(events: Sequence[Event]) -> Iterator[int]:
    """Yield for each StepDone the index of its write, or of the flush in that thread before its next write.

    A write may have several; its detail is their number.
    """
    for index, event in enumerate(events):
        if event.kind == "write":
            written_at = index
            for later in range(index + 1, len(events)):
                if events[later].thread == event.thread and events[later].kind in ("write", "flush"):
                    written_at = later if events[later].kind == "flush" else index
                    break
            yield from [written_at] * int(event.detail)


def io_threads(events: Sequence[Event]) -> set[int]:
    """Return the threads that read or write frames."""
    return {event.thread for event in events if event.kind in ("read", "frame", "write", "flush")}


def files_in(events: Sequence[Event], threads: set[int]) -> set[str]:
    """Return the files with a line that ran in one of the threads."""
    return {event.detail for event in events if event.kind == "line" and event.thread in threads}


# ---- printing


def print_files(role: Role, processes: Sequence[Process]) -> None:
    """Print the number and the names of the files that count for a role, then the files that run less often.

    Each percentage is the largest among the processes.
    """
    fractions: dict[str, float] = {}
    for process in processes:
        counts = Counter(file for files in process.files_by_window for file in files)
        for file, count in counts.items():
            fractions[file] = max(fractions.get(file, 0.0), count / len(process.files_by_window))
    counted = sorted(file for file, fraction in fractions.items() if fraction >= MIN_FRACTION)
    windows = ", ".join(str(len(process.files_by_window)) for process in processes)
    print(f"\n{role.name.lower():12}{len(counted):4} files   {role.value}; windows: {windows}")
    for file in counted:
        print(f"    {file}  {fractions[file]:.0%}")
    for file in sorted(fractions.keys() - set(counted)):
        print(f"    ({file}  {fractions[file]:.0%}, not counted)")


if __name__ == "__main__":
    main()
