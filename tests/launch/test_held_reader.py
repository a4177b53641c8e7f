"""Tests of many plans and reports while the coordinator's readers are blocked: no deadlock and no lost message."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.pipeline import Pipeline
from mlx_k2.deployment.bring_up import collect
from mlx_k2.launch import stage_process
from mlx_k2.launch.group import StageGroup
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.protocol.messages import (
    Connect,
    Connected,
    FromStage,
    Prepare,
    Prepared,
    RingLinks,
    Step,
    decode_from_stage,
)
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy
from mlx_k2.weights.model_source import ModelSource
from tests.launch.guarded import stand_in_python
from tests.local_cluster import tokens_of
from tests.scheduling.simulation import k2_stages

PROMPT_TOKENS = 200_000
CHUNK_TOKENS = 2048
BLOCKED_S = 1.0
NUM_STAGES = 2


class ReaderBlock:
    """A switch that blocks each stage's reader at its next message, until BLOCKED_S after all of them are blocked."""

    def __init__(self) -> None:
        self._may_read = threading.Event()
        self._may_read.set()
        self._lock = threading.Lock()
        self.num_blocked = 0

    def start(self) -> None:
        """Block the readers from now on."""
        self._may_read.clear()

    def decode(self, payload: bytes) -> FromStage:
        """Decode a message. The readers call this in place of ``decode_from_stage``."""
        if not self._may_read.is_set():
            with self._lock:
                self.num_blocked += 1
                if self.num_blocked == NUM_STAGES:
                    threading.Timer(BLOCKED_S, self._may_read.set).start()
            self._may_read.wait()
        return decode_from_stage(payload)


@pytest.fixture
def reader_block(monkeypatch: pytest.MonkeyPatch) -> ReaderBlock:
    reader_block = ReaderBlock()
    monkeypatch.setattr(stage_process, "decode_from_stage", reader_block.decode)
    return reader_block


@contextmanager
def connected_stages(folder: Path) -> Iterator[StageGroup]:
    """Yield stages that send arrays of Kimi K2's hidden size over a real ring."""
    locations = [StageLocation(python=stand_in_python(folder, "ring"))] * NUM_STAGES
    with StageGroup(locations, lease_s=20.0, log=lambda _: None) as group:
        for rank in range(NUM_STAGES):
            model = ModelSource(path_or_repo="")  # the stage program loads none
            group.send(rank, Prepare(rank, NUM_STAGES, model, listen=("127.0.0.1",)))
        prepared = collect(group, Prepared, range(NUM_STAGES), silence_s=30, task="prepare")
        links = RingLinks(tuple(answer.addresses for answer in prepared))
        group.send_all(Connect(links, to_next=None, from_previous=None))
        collect(group, Connected, range(NUM_STAGES), silence_s=30, task="connect")
        yield group


@pytest.mark.slow
def test_a_prompt_of_200_000_tokens_completes_although_readers_were_blocked(
    reader_block: ReaderBlock, tmp_path: Path
) -> None:
    limits = SchedulerLimits(num_slots=1, context_tokens=262_144, chunk_tokens=CHUNK_TOKENS, num_stages=NUM_STAGES)
    policy = StepPolicy(k2_stages(NUM_STAGES))
    prompt = Request(tuple(range(PROMPT_TOKENS)), max_tokens=3, sampling=Sampling(seed=0), stop_ids=frozenset())
    with connected_stages(tmp_path) as group:
        scheduler = Scheduler(limits, policy)
        reader_block.start()
        with Engine(Pipeline(group, scheduler, policy, vocab_size=PROMPT_TOKENS), scheduler) as engine:
            assert len(tokens_of(engine, prompt)[prompt]) == 3
            assert engine.use[-1].num_tokens == PROMPT_TOKENS + 2  # the last token is not computed
    assert reader_block.num_blocked == NUM_STAGES


def test_two_thousand_plans_and_their_reports_arrive_although_readers_were_blocked(
    reader_block: ReaderBlock, tmp_path: Path
) -> None:
    with connected_stages(tmp_path) as group:
        reader_block.start()
        for number in range(2000):
            group.send_all(Step(number, ()))
        reports = [group.receive(30) for _ in range(2000 * NUM_STAGES)]
    assert None not in reports
    assert reader_block.num_blocked == NUM_STAGES
