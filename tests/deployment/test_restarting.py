"""Tests of answers that continue on new stages after a fault: the same tokens, none lost and none repeated."""

import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest

from mlx_k2.coordinator.engine import Engine, engine_on
from mlx_k2.deployment.cluster_options import open_source
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.restarting import WAITING, Restart, RestartingDeployment
from mlx_k2.errors import NotFinite, StageFault, StageStartError
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import Request
from tests.local_cluster import local_host, local_request, marked_host, request, stage_process, together, write_model
from tests.processes import started_processes

REQUESTS = (request(num_prompt=90, max_tokens=60, seed=5), request(num_prompt=7, max_tokens=80, temperature=0))
NUM_TOKENS = sum(each.max_tokens for each in REQUESTS)
"""Tokens of both answers."""
Answers = dict[Request, list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def expected_answers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Return the answers of one stage without a fault."""
    with restarting_engine(model, tmp_path_factory.mktemp("expected"), 1) as (engine, _):
        return answers(engine)


@contextmanager
def restarting_engine(
    model: Path, folder: Path, num_stages: int, limit: int | None = 5, listener: DeploymentListener | None = None
) -> Iterator[tuple[Engine, list[Restart]]]:
    """Yield an engine over stages that start again after a fault, and the list of restarts so far.

    ``stage_process`` finds the stages by the marks of their hosts. A stopped stage is a fault after 1.5 s.
    """
    hosts = [marked_host(folder, rank, sys.executable) for rank in range(num_stages)]
    restarts: list[Restart] = []

    def on_restart(restart: Restart, phase: str) -> None:
        if phase == WAITING:
            restarts.append(restart)

    with (
        RestartingDeployment(
            *open_source(local_request(model, hosts).with_options(stall_timeout_s=1.5)),
            listener or DeploymentListener(),
            limit,
            first_wait_s=0.05,
        ) as restarting,
        engine_on(
            restarting.deployment, draft_mode=DraftMode.NGRAM, restarts=restarting, on_restart=on_restart
        ) as engine,
    ):
        yield engine, restarts


def answers(engine: Engine, faults: Mapping[int, Callable[[], None]] = MappingProxyType({})) -> Answers:
    """Return the tokens of REQUESTS. ``faults[count]`` is called after ``count`` tokens of both together."""
    token_ids: Answers = {submitted: [] for submitted in REQUESTS}
    for count, (submitted, token) in enumerate(together(engine, *REQUESTS), start=1):
        token_ids[submitted].append(token.token_id)
        if count in faults:
            faults[count]()
    return token_ids


@pytest.mark.slow
def test_two_answers_continue_with_the_same_tokens_after_three_stages_were_killed_and_one_suspended(
    model: Path, tmp_path: Path, expected_answers: Answers
) -> None:
    faults = {
        10: lambda: stage_process(0).kill(),
        40: lambda: stage_process(1).kill(),
        70: lambda: stage_process(2).kill(),
        100: lambda: stage_process(1).suspend(),
    }
    with restarting_engine(model, tmp_path, 3) as (engine, restarts):
        assert answers(engine, faults) == expected_answers
    *kills, suspension = (restart.reason for restart in restarts)
    for rank, reason in enumerate(kills):
        assert re.match(rf"stage {rank} on this machine \(.+\) ended with signal 9", reason), reason
    assert re.match(r"stage 1 on this machine \(.* (of|after) step \d+ for \d+ s\) is stopped", suspension), suspension
    assert [(restart.number, restart.wait_s) for restart in restarts] == [(1, 0.05), (2, 0.1), (3, 0.2), (4, 0.4)]


@pytest.mark.slow
def test_with_a_limit_of_0_the_first_fault_is_raised(model: Path, tmp_path: Path) -> None:
    with (
        restarting_engine(model, tmp_path, 2, limit=0) as (engine, restarts),
        pytest.raises(StageFault, match=r"stage 1 on this machine \(.+\) ended with signal 9"),
    ):
        answers(engine, {5: lambda: stage_process(1).kill()})
    assert restarts == []


def test_a_stage_that_cannot_start_again_is_named_after_the_last_restart(model: Path, tmp_path: Path) -> None:
    with restarting_engine(model, tmp_path, 2, limit=2) as (engine, restarts):
        events = together(engine, *REQUESTS)
        next(events)
        (tmp_path / "python-1").unlink()  # the program that marked_host has written for stage 1
        stage_process(1).kill()
        with pytest.raises(StageStartError, match=r"stage 1 on this machine did not start: .*\(given up after 2 rest"):
            list(events)
    assert [restart.number for restart in restarts] == [1, 2]
    assert "did not start" in restarts[1].reason


@pytest.mark.slow
def test_without_a_limit_the_stages_start_again_until_they_can(model: Path, tmp_path: Path) -> None:
    with (
        restarting_engine(model, tmp_path, 2, limit=None) as (engine, restarts),
        ThreadPoolExecutor(1) as pool,
    ):

        def repair_after_three_restarts() -> None:
            while len(restarts) < 4:
                threading.Event().wait(0.01)
            marked_host(tmp_path, 1, sys.executable)

        events = together(engine, *REQUESTS)
        next(events)
        (tmp_path / "python-1").unlink()  # marked_host writes it again
        stage_process(1).kill()
        repair = pool.submit(repair_after_three_restarts)
        assert len(list(events)) == NUM_TOKENS - 1
        repair.result(10)
    assert [restart.limit for restart in restarts] == [None] * len(restarts)
    assert [restart.count for restart in restarts][:4] == ["1", "2", "3", "4"]


@dataclass
class FailingListener(DeploymentListener):
    """Listener that, once armed, raises each of ``errors`` at the start of a restart, in their order."""

    errors: list[Exception]
    is_armed: bool = False

    def phase(self, what: str) -> None:
        if self.is_armed and self.errors and what.startswith("starting"):
            raise self.errors.pop(0)


@pytest.mark.slow
def test_without_a_limit_a_restart_that_ended_with_any_error_is_tried_again(
    model: Path, tmp_path: Path, expected_answers: Answers
) -> None:
    listener = FailingListener([RuntimeError("can't start new thread"), OSError(24, "Too many open files")])
    with restarting_engine(model, tmp_path, 1, limit=None, listener=listener) as (engine, restarts):
        listener.is_armed = True
        assert answers(engine, {10: lambda: stage_process(0).kill()}) == expected_answers
    reasons = [restart.reason for restart in restarts[1:]]
    assert reasons == ["can't start new thread", "[Errno 24] Too many open files"]


@pytest.mark.slow
def test_a_second_nan_is_final_also_with_another_fault_before_the_first(model: Path) -> None:
    restarts: set[tuple[int, str]] = set()  # a set, as each phase of a restart adds to it
    request_and_model = open_source(local_request(model, [local_host()]))
    with RestartingDeployment(*request_and_model, DeploymentListener(), limit=5, first_wait_s=0.05) as restarting:
        for error in (StageFault("killed", 0), NotFinite("NaN in step 3", 0)):
            restarting.restart(error, lambda restart, _: restarts.add((restart.number, restart.reason)))
        with pytest.raises(NotFinite, match=r"NaN in step 9 \(given up after 2 restarts\)"):
            restarting.restart(NotFinite("NaN in step 9", 0), lambda restart, _: pytest.fail(restart.reason))
    assert restarts == {(1, "killed"), (2, "NaN in step 3")}


@dataclass
class KillingListener(DeploymentListener):
    """Listener that, once armed, kills stage 1 at the start of each of ``phases``, in their order."""

    phases: list[str]
    is_armed: bool = False

    def phase(self, what: str) -> None:
        if self.is_armed and self.phases and what == self.phases[0]:
            self.phases.pop(0)
            stage_process(1).kill()


@pytest.mark.slow
def test_each_stage_that_is_killed_during_a_restart_causes_one_more_restart(
    model: Path, tmp_path: Path, expected_answers: Answers
) -> None:
    listener = KillingListener(["connecting", "loading"])
    with restarting_engine(model, tmp_path, 2, listener=listener) as (engine, restarts):
        listener.is_armed = True
        assert answers(engine, {10: lambda: stage_process(0).kill()}) == expected_answers
    assert [restart.number for restart in restarts] == [1, 2, 3]
    for restart in restarts[1:]:
        assert re.match(r"stage 1 on this machine \(.+\) ended with signal 9", restart.reason), restart.reason


@pytest.mark.slow
def test_a_fault_between_requests_causes_one_restart_and_no_old_process_remains(
    model: Path, tmp_path: Path, expected_answers: Answers
) -> None:
    with restarting_engine(model, tmp_path, 2) as (engine, restarts):
        assert answers(engine) == expected_answers
        old_processes = started_processes()
        stage_process(1).kill()
        assert answers(engine) == expected_answers
        assert not any(process.is_running() for process in old_processes)
        assert len(started_processes()) == len(old_processes)
    assert len(restarts) == 1
