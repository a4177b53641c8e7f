"""A stage that sends one false message. As a program: lying_stage.py FOLDER is the stage, to be started by a guard.

The kind of the false message, the lie, is the name of a file in FOLDER. Each lie of LIES replaces the report of step 3;
the file is removed first, so that the next stage sends no false message.
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

LIES = {
    "step": "reported step 12345, and step 3 is due",
    "again": "reported step 0, and step 3 is due",
    "message": "sent a Connected between steps",
    "time": "reported an impossible time of step 3",
    "fewer": "sent 0 tokens in step 3, in which it samples 1",
    "more": "sent 2 tokens in step 3, in which it samples 1",
    "token": "sent the token id 768, and the vocabulary has 768",
    "negative": "sent the token id -1, and the vocabulary has 768",
    "top": "sent the token id 99999, and the vocabulary has 768",
    "nesting": "not a message from a stage: ",
}
"""The false reports of step 3, and the start of the error's text after the stage's name."""

START_LIES: dict[str, tuple[FromStage, str]] = {
    "before": (StepDone(0, 0.0), "sent an unexpected StepDone: it had to start"),
    "elsewhere": (Prepared(("192.0.2.1:9",), ""), "listens on 192.0.2.1:9, which is not in the hostfile"),
    "nowhere": (Prepared((), ""), "listens on nowhere, which is not in the hostfile"),
    "early": (Loaded(0, 0), "sent an unexpected Loaded: it had to connect to its neighbours"),
}
"""The lies during the start: the false message, and the start of the error's text after the stage's name."""
_TRUE_ANSWER = {"before": Hello, "elsewhere": Prepared, "nowhere": Prepared, "early": Connected}


def lying_python(folder: Path, lie: str) -> str:
    """Write to ``folder`` a stand-in for a host's Python that runs a guard over a lying stage. Return its path."""
    folder.mkdir()
    (folder / lie).touch()
    script = folder / "python"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {__file__} guard {folder}\n")
    script.chmod(0o755)
    return str(script)


def false_report(lie: str, done: StepDone) -> FromStage:
    """Return the message that replaces a true report."""
    (token,) = done.tokens
    false_fields: dict[str, dict[str, Any]] = {
        "step": {"number": 12345},
        "again": {"number": 0},
        "time": {"busy_s": math.nan},
        "fewer": {"tokens": ()},
        "more": {"tokens": (token, token)},
        "token": {"tokens": (SampledToken(768),)},
        "negative": {"tokens": (SampledToken(-1),)},
        "top": {"tokens": (SampledToken(1, -1.0, ((99999, -1.0),)),)},
    }
    return Connected() if lie == "message" else msgspec.structs.replace(done, **false_fields[lie])


def main(folder: Path) -> None:
    protocol_fd = os.dup(1)
    os.dup2(2, 1)

    class LyingService(StageService):
        def _send(self, message: FromStage) -> None:
            for lie, (false_message, _) in START_LIES.items():
                if isinstance(message, _TRUE_ANSWER[lie]) and (folder / lie).exists():
                    digest = {"model_digest": message.model_digest} if isinstance(message, Prepared) else {}
                    message = msgspec.structs.replace(false_message, **digest)
            for lie in LIES:
                if isinstance(message, StepDone) and message.number == 3 and (folder / lie).exists():
                    (folder / lie).unlink()
                    if lie == "nesting":
                        os.write(protocol_fd, encode_frame(Kind.MESSAGE, b"\x91" * 100_000))
                        return
                    message = false_report(lie, message)
            super()._send(message)

    service.StageService = LyingService  # type: ignore[misc]
    service.serve(inward_fd=0, outward_fd=protocol_fd)


if __name__ == "__main__":
    if sys.argv[1] == "guard":
        os._exit(run_guard([sys.executable, __file__, sys.argv[2]]))
    main(Path(sys.argv[1]))
