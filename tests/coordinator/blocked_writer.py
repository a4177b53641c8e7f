"""Program with two answers at once: it writes one to stdout, which may block, and reports the end of each to stderr.

Run as: blocked_writer.py MODEL_FOLDER. The tokens of WRITTEN_REQUEST are written as by `generate --json`. Two lines go
to stderr: "other ended" at the end of the other answer, then "written answer ended" when the engine has finished the
written one.
"""

import sys
import threading
from dataclasses import replace
from pathlib import Path

from mlx_k2.cli.output import JsonOutput
from mlx_k2.coordinator.handle import Handle, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.reply_policy import ReplyPolicy
from mlx_k2.sampling import Sampling
from mlx_k2.text.tokenizer import load_tokenizer
from tests.local_cluster import VOCAB_SIZE, local_cluster, local_host, request

NUM_TOKENS = 500
"""Tokens of each answer."""
WRITTEN_REQUEST = replace(request(5, NUM_TOKENS), sampling=Sampling(seed=1, num_logprobs=20))
"""Its answer is about 600 kB of output, more than the buffers of a terminal hold."""
OTHER_REQUEST = request(9, NUM_TOKENS)


def main(model: Path) -> None:
    with local_cluster(model, [local_host()]) as cluster:
        tokenizer = load_tokenizer(cluster.deployment.model.files, VOCAB_SIZE)
        submissions = [
            Submission(submitted, ReplyPolicy(tokenizer, submitted)) for submitted in (WRITTEN_REQUEST, OTHER_REQUEST)
        ]
        written, other = cluster.engine.submit_all(submissions)
        thread = threading.Thread(target=report_ends, args=[other, written])
        thread.start()
        output = JsonOutput(tokenizer)
        for event in written.events():
            if isinstance(event, Token):
                output.show_event(event)
        thread.join()


def report_ends(other: Handle, written: Handle) -> None:
    """Write the two lines to stderr. ``main`` reads the events of ``written``."""
    for _ in other.events():
        pass
    sys.stderr.write("other ended\n")
    while not written.has_ended:
        threading.Event().wait(0.01)
    sys.stderr.write("written answer ended\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
