"""A real stage that sends one wrong message. As a program: misreporting_stage.py FOLDER, to be started by a guard.

The name of a file in FOLDER selects the wrong message. One of WRONG_REPORTS replaces the report of step 3, once: the
file is removed then, and the stages that start after the fault are correct.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from mlx_k2.guard.guard import run_guard
from mlx_k2.protocol.framing import Kind, encode_frame
from mlx_k2.protocol.messages import Connected, FromStage, Hello, Loaded, Prepared, StepDone
from mlx_k2.sampling import SampledToken
from mlx_k2.stage import service
from mlx_k2.stage.service import StageService
from tests.local_cluster import VOCAB_SIZE

WRONG_REPORTS = {
    "future-step": "reported step 12345, and step 3 is due",
    "past-step": "reported step 0, and step 3 is due",
    "other-message": "sent a Connected between steps",
    "nan-time": "reported an impossible time of step 3",
    "no-token": "sent 0 tokens in step 3, in which it samples 1",
    "two-tokens": "sent 2 tokens in step 3, in which it samples 1",
    "large-token-id": f"sent the token id {VOCAB_SIZE}, and the vocabulary has {VOCAB_SIZE}",
    "negative-token-id": f"sent the token id -1, and the vocabulary has {VOCAB_SIZE}",
    "large-top-token-id": f"sent the token id 99999, and the vocabulary has {VOCAB_SIZE}",
    "deep-nesting": "not a message from a stage: ",
}
"""The start of the error about the last stage, for each wrong report of step 3."""

WRONG_START_MESSAGES: dict[str, tuple[type, FromStage, str]] = {
    "step-at-start": (Hello, StepDone(0, busy_s=0.0), "sent an unexpected StepDone: it had to start"),
    "foreign-address": (
        Prepared,
        Prepared(addresses=("192.0.2.1:9",), model_digest=""),
        "listens on 192.0.2.1:9, which is not in the hostfile",
    ),
    "no-address": (
        Prepared,
        Prepared(addresses=(), model_digest=""),
        "listens on nowhere, which is not in the hostfile",
    ),
    "early-loaded": (
        Connected,
        Loaded(held_bytes=0, peak_bytes=0),
        "sent an unexpected Loaded: it had to connect to its neighbours",
    ),
}
"""The message during the start that is replaced, its replacement, and the error about the stage."""


def misreporting_python(folder: Path, selected: str) -> str:
    """Make ``folder`` with a stand-in for a host's Python that runs a guard over this stage; return its path."""
    folder.mkdir()
    (folder / selected).touch()
    script = folder / "python"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {__file__} guard {folder}\n")
    script.chmod(0o755)
    return str(script)


def wrong_report(name: str, report: StepDone) -> FromStage:
    """Return the wrong report that replaces the true one of a step with one sampled token."""
    (token,) = report.tokens
    wrong_fields: dict[str, dict[str, Any]] = {
        "future-step": {"number": 12345},
        "past-step": {"number": 0},
        "nan-time": {"busy_s": math.nan},
        "no-token": {"tokens": ()},
        "two-tokens": {"tokens": (token, token)},
        "large-token-id": {"tokens": (SampledToken(VOCAB_SIZE),)},
        "negative-token-id": {"tokens": (SampledToken(-1),)},
        "large-top-token-id": {"tokens": (SampledToken(1, logprob=-1.0, top=((99999, -1.0),)),)},
    }
    return Connected() if name == "other-message" else msgspec.structs.replace(report, **wrong_fields[name])


def main(folder: Path) -> None:
    protocol_fd = os.dup(1)  # for frames only, as in a real stage
    os.dup2(2, 1)

    class MisreportingService(StageService):
        def _send(self, message: FromStage) -> None:
            for name, (replaced_type, replacement, _) in WRONG_START_MESSAGES.items():
                if isinstance(message, replaced_type) and (folder / name).exists():
                    # without the right digest the coordinator would report the digest first
                    digest = {"model_digest": message.model_digest} if isinstance(message, Prepared) else {}
                    message = msgspec.structs.replace(replacement, **digest)
            for name in WRONG_REPORTS:
                if isinstance(message, StepDone) and message.number == 3 and (folder / name).exists():
                    (folder / name).unlink()
                    if name == "deep-nesting":
                        os.write(protocol_fd, encode_frame(Kind.MESSAGE, b"\x91" * 100_000))  # lists of one entry
                        return
                    message = wrong_report(name, message)
            super()._send(message)

    service.StageService = MisreportingService  # type: ignore[misc]
    service.serve(inward_fd=0, outward_fd=protocol_fd)


if __name__ == "__main__":
    if sys.argv[1] == "guard":
        os._exit(run_guard([sys.executable, __file__, sys.argv[2]]))
    main(Path(sys.argv[1]))
