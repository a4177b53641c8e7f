"""Test of the warnings of a stage that loads: the user sees them with the stage and its host."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from mlx_k2.deployment import bring_up
from mlx_k2.deployment.deploy import deploy
from mlx_k2.protocol.messages import Loaded
from tests.deployment.test_run_log import RecordingListener
from tests.local_cluster import local_host, local_request, write_model

pytestmark = pytest.mark.timeout(60)


def test_a_warning_of_a_stage_is_notified_with_the_name_of_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = bring_up.ask

    def ask_and_add_warning(*arguments: Any) -> object:
        (answer,) = ask(*arguments)  # of the only stage
        if isinstance(answer, Loaded):
            answer = msgspec.structs.replace(answer, warnings=("a kernel is not used",))
        return (answer,)

    monkeypatch.setattr(bring_up, "ask", ask_and_add_warning)
    listener = RecordingListener()
    with deploy(local_request(write_model(tmp_path / "model"), [local_host()]), None, listener):
        assert "stage 0 on this machine: a kernel is not used" in listener.notifications
