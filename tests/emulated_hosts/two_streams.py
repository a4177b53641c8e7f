"""Program that runs two streams over the hosts of a hostfile and reports events, while `fault_run.py` causes faults.

Run as: two_streams.py OPTIONS, where OPTIONS is a JSON object. It writes one JSON object a line to stdout:
{"phase", "start"}, {"stream", "token"}, {"restart"}, {"notify"}, and last {"error"} or {"ended"}. ``start`` is 1 at the
first start of a phase, 2 at the second. ``halts`` maps phases to such numbers: at that start the program waits for a
line on stdin.
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import msgspec

from mlx_k2.cluster.hostfile import read_hostfile
from mlx_k2.coordinator.engine import engine_on
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest
from mlx_k2.deployment.listener import DeploymentListener, StageReport
from mlx_k2.deployment.restarting import WAITING, Restart, RestartingDeployment
from mlx_k2.errors import ClusterError
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_source import ModelSource
from tests.local_cluster import CONTEXT_TOKENS, request, together

STREAMS = (request(400, 100, seed=5), request(7, 130, temperature=0))
NUM_TOKENS_BEFORE_DECODE = 10
"""The phase decode is reported after this number of tokens, both streams counted together."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the program: what to run, and at which starts of phases to halt."""

    model: str
    hostfile: str
    log_dir: str
    lease_s: float = 20.0
    stall_timeout_s: float = 7.0
    restarts: int = 3
    halts: dict[str, int] = {}


class EventWriter(DeploymentListener):
    """Listener that reports each phase, and halts in the phases of ``halts``."""

    def __init__(self, halts: dict[str, int]) -> None:
        self._halts = halts
        self._num_starts: Counter[str] = Counter()

    def phase(self, what: str) -> None:
        name = what.split(maxsplit=1)[0]
        self._num_starts[name] += 1
        write_event(phase=name, start=self._num_starts[name])
        if self._halts.get(name) == self._num_starts[name]:
            sys.stdin.readline()

    def notify(self, line: str) -> None:
        write_event(notify=line)

    def step_done(self, report: StageReport) -> None:
        """Report the phase prefill at the first step that a stage has finished. Called by `run_streams`."""
        if not self._num_starts["prefill"]:
            self.phase("prefill")


def write_event(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def report_restart(restart: Restart, phase: str) -> None:
    """Report a restart once, in its first phase."""
    if phase == WAITING:
        write_event(restart=dataclasses.asdict(restart))


def main(options: Options) -> int:
    """Run the streams; return 1 if they ended with an error, else 0."""
    source = ModelSource(path_or_repo=options.model)
    deployment_request = DeploymentRequest(
        ClusterOptions(context_tokens=CONTEXT_TOKENS, lease_s=options.lease_s, stall_timeout_s=options.stall_timeout_s),
        read_hostfile(Path(options.hostfile)),
        source,
        num_slots=len(STREAMS),
    )
    model = describe_model(read_model_files(source).files, options.model)
    writer = EventWriter(options.halts)
    try:
        log_dir = Path(options.log_dir)
        with RestartingDeployment(deployment_request, model, writer, options.restarts, log_dir) as restarting:
            run_streams(restarting, writer)
            writer.phase("stopping")
    except ClusterError as error:
        write_event(error=str(error))
        return 1
    write_event(ended=True)
    return 0


def run_streams(restarting: RestartingDeployment, writer: EventWriter) -> None:
    log_report = restarting.on_report
    assert log_report is not None

    def on_report(report: StageReport) -> None:
        log_report(report)
        writer.step_done(report)

    with engine_on(
        restarting.deployment,
        draft_mode=DraftMode.NGRAM,
        on_report=on_report,
        restarts=restarting,
        on_restart=report_restart,
    ) as engine:
        for num_tokens, (stream, token) in enumerate(together(engine, *STREAMS), start=1):
            write_event(stream=STREAMS.index(stream), token=token.token_id)
            if num_tokens == NUM_TOKENS_BEFORE_DECODE:
                writer.phase("decode")


if __name__ == "__main__":
    sys.exit(main(msgspec.json.decode(sys.argv[1], type=Options)))
