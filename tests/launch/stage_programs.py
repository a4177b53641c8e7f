"""Small stage programs for tests of guard and group, run as ``python stage_programs.py NAME`` by a guard."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from mlx_k2.protocol.framing import Kind, encode_frame, read_frame
from mlx_k2.protocol.guard_messages import Phase, PhaseUpdate
from mlx_k2.protocol.messages import (
    Connect,
    Connected,
    FromStage,
    Prepare,
    Prepared,
    RingLinks,
    Step,
    StepDone,
    Stop,
    ToStage,
    decode_to_stage,
    encode_message,
)
from mlx_k2.sampling import SampledToken
from mlx_k2.stage.ports import HeldPorts

_output = os.fdopen(os.dup(1), "wb")  # for frames only: what a library prints to stdout goes to stderr instead
os.dup2(2, 1)


def send(message: FromStage) -> None:
    _output.write(encode_frame(Kind.MESSAGE, encode_message(message)))
    _output.flush()


def report_phase(update: PhaseUpdate) -> None:
    _output.write(encode_frame(Kind.STAGE_STATUS, update.to_json()))
    _output.flush()


def read_messages() -> Iterator[ToStage]:
    """Yield the coordinator's messages until Stop or the end of the input."""
    while (frame := read_frame(sys.stdin.buffer)) is not None:
        message = decode_to_stage(frame.payload)
        if isinstance(message, Stop):
            return
        yield message


def echo() -> None:
    """Report each step as done at once."""
    sys.stderr.write("the echo stage is up\n")
    send(Connected())
    for message in read_messages():
        assert isinstance(message, Step)
        send(StepDone(message.number, busy_s=0.0))


def has_sent() -> None:
    """Report the phase after step 5, whose hidden states were sent, then do as ``echo``."""
    report_phase(PhaseUpdate(Phase.IDLE, 5))
    echo()


def receives() -> None:
    """Report the phase in which a stage waits for the hidden states of step 5, then do as ``echo``."""
    report_phase(PhaseUpdate(Phase.RECEIVING, 5, limit_s=600.0))
    echo()


def exceeds_its_limit() -> None:
    """Report a phase with a limit of 0.5 s, and stay in it while holding the GIL."""
    report_phase(PhaseUpdate(Phase.CONNECTING, limit_s=0.5))
    reads_nothing()


def reads_nothing() -> None:
    """Read nothing and hold the GIL, as mlx.distributed.init does, for 1000 s."""
    send(Connected())
    ctypes.PyDLL(None).sleep(1000)


def ignores_signals() -> None:
    """Ignore the end of the input and every signal that can be ignored."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    send(Connected())
    time.sleep(1000)


def with_child() -> None:
    """Start a child process that runs for 1000 s, then do as ``echo``."""
    subprocess.Popen(["sleep", "1000"])
    echo()


def failing() -> None:
    """End with exit code 3."""
    send(Connected())
    sys.stderr.write("ValueError: no such layer\n")
    sys.exit(3)


def crashing() -> None:
    """End with a segmentation fault."""
    send(Connected())
    os.kill(os.getpid(), signal.SIGSEGV)


def writes_garbage() -> None:
    """Write bytes that are no frame, then run for 1000 s."""
    send(Connected())
    _output.write(b"this is not a frame")
    _output.flush()
    time.sleep(1000)


def flooding() -> None:
    """Write 10 MB to stderr in lines of up to 100,000 characters, then do as ``echo``."""
    for _ in range(100):
        sys.stderr.write("x" * 1000 + "\n" + "y" * 99_000)
    sys.stderr.write("\n")
    echo()


def repeats_answers() -> None:
    """Report each step a thousand times without a pause."""
    send(Connected())
    for message in read_messages():
        assert isinstance(message, Step)
        for _ in range(1000):
            send(StepDone(message.number, busy_s=0.0))


def ring() -> None:
    """Join MLX's ring and send an array from stage to stage. Each stage adds the step's number.

    The array has Kimi K2's hidden size, 7168: 8 float32 rows for a step without rows, else a bfloat16 row per token.
    The sampled tokens are the mean of its first 8 rows.
    """
    import mlx.core as mx  # noqa: PLC0415 - without mlx the other stages start in a tenth of the time

    mx.set_default_device(mx.cpu)
    rank = num_stages = 0
    ports = HeldPorts([])
    for message in read_messages():
        if isinstance(message, Prepare):
            rank, num_stages = message.rank, message.num_stages
            ports = HeldPorts(message.listen)
            send(Prepared(addresses=ports.addresses, model_digest=""))
        elif isinstance(message, Connect):
            assert isinstance(message.links, RingLinks)
            ports.release()
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                file.write(json.dumps(message.links.addresses))
                file.flush()
                os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE=file.name)
                mx.distributed.init(backend="ring", strict=True)
            send(Connected())
        elif isinstance(message, Step):
            num_tokens = sum(len(row.token_ids) for row in message.rows)
            num_sampled = sum(row.sampling is not None for row in message.rows) if message.rows else 1
            x = mx.zeros((num_tokens or 8, 7168), dtype=mx.bfloat16 if message.rows else mx.float32)
            if rank > 0:
                x = mx.distributed.recv_like(x, rank - 1)
                mx.eval(x)
            x = x + message.number
            if rank < num_stages - 1:
                mx.eval(mx.distributed.send(x, rank + 1))
                send(StepDone(message.number, busy_s=0.0))
            else:
                tokens = (SampledToken(token_id=int(float(x[:8].mean()))),) * num_sampled
                send(StepDone(message.number, busy_s=0.0, tokens=tokens))


PROGRAMS: dict[str, Callable[[], None]] = {
    program.__name__: program
    for program in (
        echo, has_sent, receives, exceeds_its_limit, reads_nothing,
        ignores_signals, with_child, failing, crashing, writes_garbage, flooding, repeats_answers, ring
    )
}  # fmt: skip

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]]()
