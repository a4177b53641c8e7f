"""Tests of answers that continue on new stages after a fault: the same tokens, none lost and none repeated."""

import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from mlx_k2.coordinator.engine import Engine, engine_on
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.restarting import WAITING, Restart, RestartingDeployment
from mlx_k2.errors import NotFinite, StageFault, StageStartError
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import Request
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.model_files import read_model_files
from tests.local_cluster import local_host, local_request, marked_host, request, stage_process, together, write_model
from tests.processes import started_processes

REQUESTS = (request(90, 60, seed=5), request(7, 80, temperature=0))
Tokens = list[list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    with restarting(model, tmp_path_factory.mktemp("undisturbed"), 1) as run:
        return answers(run)


@dataclass
class Run:
    """An engine on stages that restart after a fault, and the restarts so far."""

    deployment: RestartingDeployment
    engine: Engine
    restarts: list[Restart]


@contextmanager
def restarting(
    model: Path, folder: Path, num_stages: int, limit: int | None = 5, listener: DeploymentListener | None = None
) -> Iterator[Run]:
    hosts = [marked_host(folder, rank, sys.executable) for rank in range(num_stages)]
    deployment_request = local_request(model, hosts).with_options(stall_timeout_s=1.5)
    description = describe_model(read_model_files(deployment_request.source).files, str(model))
    restarts: list[Restart] = []

    def on_restart(restart: Restart, phase: str) -> None:
        if phase == WAITING:
            restarts.append(restart)

    with (
        RestartingDeployment(
            deployment_request, description, listener or DeploymentListener(), limit, first_wait_s=0.05
        ) as deployment,
        engine_on(
            deployment.deployment, draft_mode=DraftMode.NGRAM, restarts=deployment, on_restart=on_restart
        ) as engine,
    ):
        yield Run(deployment, engine, restarts)


def answers(run: Run, faults: dict[int, Callable[[], None]] | None = None) -> Tokens:
    """Return the tokens of the answers to REQUESTS. Call ``faults[i]`` after token i of both together, from 0."""
    tokens: dict[Request, list[int]] = {each: [] for each in REQUESTS}
    for count, (answered, token) in enumerate(together(run.engine, *REQUESTS)):
        tokens[answered].append(token.token_id)
        if faults and count in faults:
            faults[count]()
    return [tokens[each] for each in REQUESTS]


@pytest.mark.slow
def test_two_streams_resume_with_the_same_tokens_after_a_stage_is_killed_or_suspended(
    model: Path, tmp_path: Path, undisturbed: Tokens
) -> None:
    faults = {
        10: lambda: stage_process(0).kill(),
        40: lambda: stage_process(1).kill(),
        70: lambda: stage_process(2).kill(),
        100: lambda: stage_process(1).suspend(),
    }
    with restarting(model, tmp_path, 3) as run:
        assert answers(run, faults) == undisturbed
    for rank, restart in enumerate(run.restarts[:3]):
        assert re.match(rf"stage {rank} on this machine \(.+\) ended with signal 9", restart.reason), restart.reason
    last_reason = run.restarts[3].reason
    assert re.match(r"stage 1 on this machine \(.* (of|after) step \d+ for \d+ s\) is stopped", last_reason), (
        last_reason
    )
    assert [(restart.number, restart.wait_s) for restart in run.restarts] == [(1, 0.05), (2, 0.1), (3, 0.2), (4, 0.4)]


@pytest.mark.slow
def test_with_no_restarts_allowed_a_fault_is_raised(model: Path, tmp_path: Path) -> None:
    with (
        restarting(model, tmp_path, 2, limit=0) as run,
        pytest.raises(StageFault, match=r"stage 1 on this machine \(.+\) ended with signal 9"),
    ):
        answers(run, {5: lambda: stage_process(1).kill()})
    assert run.restarts == []


def test_a_stage_that_cannot_start_again_is_named_after_the_restart_limit(model: Path, tmp_path: Path) -> None:
    with restarting(model, tmp_path, 2, limit=2) as run:
        events = together(run.engine, *REQUESTS)
        next(events)
        (tmp_path / "python-1").unlink()
        stage_process(1).kill()
        with pytest.raises(StageStartError, match=r"stage 1 on this machine did not start: .*\(given up after 2 rest"):
            list(events)
    assert [restart.number for restart in run.restarts] == [1, 2]
    assert "did not start" in run.restarts[1].reason


@pytest.mark.slow
def test_without_a_limit_the_stages_start_again_until_they_can(model: Path, tmp_path: Path) -> None:
    with restarting(model, tmp_path, 2, limit=None) as run:
        script = tmp_path / "python-1"
        text = script.read_text()

        def repair() -> None:
            while len(run.restarts) < 4:
                threading.Event().wait(0.01)
            marked_host(tmp_path, 1, sys.executable)

        events = together(run.engine, *REQUESTS)
        next(events)
        script.unlink()
        stage_process(1).kill()
        repairing = threading.Thread(target=repair, daemon=True)
        repairing.start()
        assert len(list(events)) == sum(each.max_tokens for each in REQUESTS) - 1
        repairing.join(10)
        assert script.read_text() == text
    assert [restart.limit for restart in run.restarts] == [None] * len(run.restarts)
    assert [restart.count for restart in run.restarts][:4] == ["1", "2", "3", "4"]


@dataclass
class FailingListener(DeploymentListener):
    """Listener that, once armed, raises each of ``errors`` at the beginning of a restart, in their order."""

    errors: list[Exception]
    is_armed: bool = False

    def phase(self, what: str) -> None:
        if self.is_armed and self.errors and what.startswith("starting"):
            raise self.errors.pop(0)


@pytest.mark.slow
def test_without_a_limit_any_error_of_a_restart_is_tried_again(
    model: Path, tmp_path: Path, undisturbed: Tokens
) -> None:
    listener = FailingListener([RuntimeError("can't start new thread"), OSError(24, "Too many open files")])
    with restarting(model, tmp_path, 1, limit=None, listener=listener) as run:
        listener.is_armed = True
        assert answers(run, {10: lambda: stage_process(0).kill()}) == undisturbed
    assert [restart.reason for restart in run.restarts[1:]] == [
        "can't start new thread",
        "[Errno 24] Too many open files",
    ]


@pytest.mark.slow
def test_after_nan_the_stages_restart_once_and_a_second_nan_is_final(model: Path) -> None:
    restarts: set[tuple[int, str]] = set()
    deployment_request = local_request(model, [local_host()])
    description = describe_model(read_model_files(deployment_request.source).files, str(model))
    with RestartingDeployment(
        deployment_request, description, DeploymentListener(), limit=5, first_wait_s=0.05
    ) as deployment:
        for error in (StageFault("killed", 0), NotFinite("NaN in step 3", 0)):
            deployment.restart(error, lambda restart, _: restarts.add((restart.number, restart.reason)))
        with pytest.raises(NotFinite, match=r"NaN in step 9 \(given up after 2 restarts\)"):
            deployment.restart(NotFinite("NaN in step 9", 0), lambda restart, _: pytest.fail(restart.reason))
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
def test_a_stage_killed_during_a_restart_causes_one_more_restart(
    model: Path, tmp_path: Path, undisturbed: Tokens
) -> None:
    listener = KillingListener(["connecting", "loading"])
    with restarting(model, tmp_path, 2, listener=listener) as run:
        listener.is_armed = True
        assert answers(run, {10: lambda: stage_process(0).kill()}) == undisturbed
    assert [restart.number for restart in run.restarts] == [1, 2, 3]
    for restart in run.restarts[1:]:
        assert re.match(r"stage 1 on this machine \(.+\) ended with signal 9", restart.reason), restart.reason


@pytest.mark.slow
def test_a_fault_between_requests_causes_one_restart_and_leaves_no_old_process(
    model: Path, tmp_path: Path, undisturbed: Tokens
) -> None:
    with restarting(model, tmp_path, 2) as run:
        assert answers(run) == undisturbed
        before = started_processes()
        stage_process(1).kill()
        assert answers(run) == undisturbed
        assert not [process for process in before if process.is_running()]
        assert len(started_processes()) == len(before)
    assert len(run.restarts) == 1
