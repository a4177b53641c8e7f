"""Test that warnings of a loading stage reach the user with the names of the stage and its host."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlx_k2.deployment import bring_up
from mlx_k2.deployment.deploy import deploy
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.launch.group import StageGroup
from mlx_k2.protocol.messages import FromStage, Loaded, ToStage
from tests.local_cluster import local_host, local_request, write_model

pytestmark = pytest.mark.timeout(60)


class RecordingListener(DeploymentListener):
    """Listener that collects the notifications."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def notify(self, line: str) -> None:
        self.lines.append(line)


def test_a_stages_warnings_are_shown_with_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = bring_up.ask

    def ask_with_warning(group: StageGroup, messages: list[ToStage], wanted: type[FromStage], *rest: Any) -> object:
        (answer,) = ask(group, messages, wanted, *rest)
        if isinstance(answer, Loaded):
            answer = msgspec.structs.replace(answer, warnings=("a kernel is not used",))
        return (answer,)

    monkeypatch.setattr(bring_up, "ask", ask_with_warning)
    listener = RecordingListener()
    with deploy(local_request(write_model(tmp_path / "model"), [local_host()]), None, listener):
        assert listener.lines == ["stage 0 on this machine: a kernel is not used"]
