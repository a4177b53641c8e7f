"""Tests of many plans while the threads that read from the stages are blocked: no deadlock, no lost message."""

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
from mlx_k2.protocol.messages import Connect, Connected, FromStage, Prepare, Prepared, RingLinks, Step
from mlx_k2.protocol.messages import decode_from_stage as decode
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


class BlockedReaders:
    """A block for reading threads: after ``block`` each waits at its next message until BLOCKED_S after all wait."""

    def __init__(self) -> None:
        self._may_read = threading.Event()
        self._may_read.set()
        self._lock = threading.Lock()
        self.num_blocked = 0

    def block(self) -> None:
        self._may_read.clear()

    def decode(self, payload: bytes) -> FromStage:
        if not self._may_read.is_set():
            with self._lock:
                self.num_blocked += 1
                if self.num_blocked == NUM_STAGES:
                    threading.Timer(BLOCKED_S, self._may_read.set).start()
            self._may_read.wait()
        return decode(payload)


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> BlockedReaders:
    readers = BlockedReaders()
    monkeypatch.setattr(stage_process, "decode_from_stage", readers.decode)
    return readers


@contextmanager
def connected_stages(folder: Path) -> Iterator[StageGroup]:
    """Yield stages that send arrays of Kimi K2's width along a real ring."""
    locations = [StageLocation(python=stand_in_python(folder, "ring"))] * NUM_STAGES
    with StageGroup(locations, lease_s=20.0, log=lambda _: None) as group:
        for rank in range(NUM_STAGES):
            group.send(rank, Prepare(rank, NUM_STAGES, ModelSource(path_or_repo=""), ("127.0.0.1",)))
        prepared = collect(group, Prepared, range(NUM_STAGES), 30, "prepare")
        links = RingLinks(tuple(answer.addresses for answer in prepared))
        group.send_all(Connect(links, None, None))
        collect(group, Connected, range(NUM_STAGES), 30, "connect")
        yield group


@pytest.mark.slow
def test_a_prompt_of_200_000_tokens_completes_while_readers_are_blocked(
    readers: BlockedReaders, tmp_path: Path
) -> None:
    limits = SchedulerLimits(num_slots=1, context_tokens=262_144, chunk_tokens=CHUNK_TOKENS, num_stages=NUM_STAGES)
    policy = StepPolicy(k2_stages(NUM_STAGES))
    prompt = Request(tuple(range(PROMPT_TOKENS)), 3, Sampling(seed=0), frozenset())
    with connected_stages(tmp_path) as group:
        scheduler = Scheduler(limits, policy)
        readers.block()
        with Engine(Pipeline(group, scheduler, policy, PROMPT_TOKENS), scheduler) as engine:
            assert len(tokens_of(engine, prompt)[prompt]) == 3
            assert engine.use[-1].num_tokens == PROMPT_TOKENS + 2  # no token follows the third one
    assert readers.num_blocked == NUM_STAGES


def test_two_thousand_plans_and_reports_are_kept_while_readers_are_blocked(
    readers: BlockedReaders, tmp_path: Path
) -> None:
    with connected_stages(tmp_path) as group:
        readers.block()
        for number in range(2000):
            group.send_all(Step(number, ()))
        reports = [group.receive(30) for _ in range(2000 * NUM_STAGES)]
    assert None not in reports
    assert readers.num_blocked == NUM_STAGES
