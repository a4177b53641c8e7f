"""Test that warnings of a loading stage reach the user with the names of the stage and its host."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_k2.deployment import bring_up
from mlx_k2.deployment.deploy import deploy
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.launch.group import StageGroup
from mlx_k2.protocol.messages import FromStage, Load, Loaded
from tests.local_cluster import local_host, local_request, write_model

pytestmark = pytest.mark.timeout(60)


class RecordedNotifications(DeploymentListener):
    """Listener that collects the notifications."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def notify(self, line: str) -> None:
        self.lines.append(line)


def test_a_stages_warnings_are_shown_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = bring_up.load

    def load_with_warning(group: StageGroup, messages: list[Load], report: Callable[[int, FromStage], None]) -> object:
        (loaded,) = load(group, messages, report)
        return (Loaded(loaded.held_bytes, loaded.peak_bytes, loaded.cache_bytes_per_token, ("a kernel is not used",)),)

    monkeypatch.setattr(bring_up, "load", load_with_warning)
    listener = RecordedNotifications()
    with deploy(local_request(write_model(tmp_path / "model"), [local_host()]), None, listener):
        assert listener.lines == ["stage 0 on this machine: a kernel is not used"]
