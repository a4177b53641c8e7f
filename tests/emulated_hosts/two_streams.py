"""A coordinator that runs two streams over a hostfile's stages as the target of faults, and reports every event.

As a program: two_streams.py OPTIONS, where OPTIONS is a JSON object. It writes one JSON object a line to stdout:
{"phase", "time"}, {"stream", "token"}, {"restart"}, {"notify"}, and last {"error"} or {"ended"}. ``halts`` maps a
phase to a number N. At the N-th start of that phase the program waits for a line on stdin.
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
DECODING_TOKEN = 10


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Options of the program: what to run, and in which phases to halt."""

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
        self._begun: Counter[str] = Counter()

    def phase(self, what: str) -> None:
        name = what.split(maxsplit=1)[0]
        self._begun[name] += 1
        write_event(phase=name, time=self._begun[name])
        if self._halts.get(name) == self._begun[name]:
            sys.stdin.readline()

    def notify(self, line: str) -> None:
        write_event(notify=line)

    def step(self, report: StageReport) -> None:
        """Report the phase prefill at the first step report."""
        if not self._begun["prefill"]:
            self.phase("prefill")


def write_event(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def report_restart(restart: Restart, phase: str) -> None:
    if phase == WAITING:
        write_event(restart=dataclasses.asdict(restart))


def main(options: Options) -> int:
    source = ModelSource(path_or_repo=options.model)
    requested = DeploymentRequest(
        ClusterOptions(context_tokens=CONTEXT_TOKENS, lease_s=options.lease_s, stall_timeout_s=options.stall_timeout_s),
        read_hostfile(Path(options.hostfile)),
        source,
        num_slots=len(STREAMS),
    )
    model = describe_model(read_model_files(source).files, options.model)
    writer = EventWriter(options.halts)
    try:
        with RestartingDeployment(requested, model, writer, options.restarts, Path(options.log_dir)) as restarting:
            run(restarting, writer)
            writer.phase("stopping")
    except ClusterError as error:
        write_event(error=str(error))
        return 1
    write_event(ended=True)
    return 0


def run(restarting: RestartingDeployment, writer: EventWriter) -> None:
    keep = restarting.on_report
    assert keep is not None

    def on_report(report: StageReport) -> None:
        keep(report)
        writer.step(report)

    with engine_on(
        restarting.deployment,
        draft_mode=DraftMode.NGRAM,
        on_report=on_report,
        restarts=restarting,
        on_restart=report_restart,
    ) as engine:
        for count, (requested, token) in enumerate(together(engine, *STREAMS)):
            write_event(stream=STREAMS.index(requested), token=token.token_id)
            if count == DECODING_TOKEN:
                writer.phase("decode")


if __name__ == "__main__":
    sys.exit(main(msgspec.json.decode(sys.argv[1], type=Options)))
