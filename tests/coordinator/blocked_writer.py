"""Two answers at once in one program: one is written to stdout, which may block; of the other only the end is reported.

As a program: blocked_writer.py MODEL_FOLDER. It writes the first answer's tokens to stdout as `generate --json` does,
and two lines to stderr: "other ended", when the other answer has ended, and "written answer ended", when the engine has
finished the first one.
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

WRITTEN_REQUEST = replace(request(5, 500), sampling=Sampling(seed=1, num_logprobs=20))
"""A request whose output is some 600 kB: more than a terminal and the kernel hold."""
OTHER_REQUEST = request(9, 500)


def main(model: Path) -> None:
    with local_cluster(model, [local_host()]) as cluster:
        tokenizer = load_tokenizer(cluster.deployment.model.files, VOCAB_SIZE)
        submissions = [Submission(each, ReplyPolicy(tokenizer, each)) for each in (WRITTEN_REQUEST, OTHER_REQUEST)]
        written, other = cluster.engine.submit_all(submissions)
        thread = threading.Thread(target=report_end, args=[other, written])
        thread.start()
        output = JsonOutput(tokenizer)
        for event in written.events():
            if isinstance(event, Token):
                output.event(event)
        thread.join()


def report_end(other: Handle, written: Handle) -> None:
    """Report on stderr that ``other`` has ended, then that ``written`` has ended in the engine."""
    for _ in other.events():
        pass
    sys.stderr.write("other ended\n")
    while not written.has_ended:
        threading.Event().wait(0.01)
    sys.stderr.write("written answer ended\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
