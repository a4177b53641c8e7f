"""Tests of a stage that sends what it cannot have computed: the error names it, and the stages start again."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from mlx_k2.errors import ClusterError, ProtocolError
from tests.cli.command import CommandLine
from tests.coordinator.lying_stage import LIES, START_LIES, lying_python
from tests.local_cluster import local_cluster, local_host, request, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize(
    "lie", [lie if lie in ("token", "nesting") else pytest.param(lie, marks=pytest.mark.slow) for lie in LIES]
)
def test_a_lie_is_a_fault_that_names_the_stage_and_the_lie(model: Path, tmp_path: Path, lie: str) -> None:
    liar = msgspec.structs.replace(local_host(), python=lying_python(tmp_path / "liar", lie))
    with local_cluster(model, [local_host(), liar]) as cluster, pytest.raises(ClusterError) as caught:
        cluster.tokens(request(8, 40))
    assert re.match(r"stage 1 on this machine .*" + re.escape(LIES[lie]), str(caught.value))


@pytest.mark.slow
@pytest.mark.parametrize("lie", START_LIES)
def test_a_lie_during_the_start_is_named_at_once(model: Path, tmp_path: Path, lie: str) -> None:
    liar = msgspec.structs.replace(local_host(), python=lying_python(tmp_path / "liar", lie))
    words = r"stage 1 on this machine .*" + re.escape(START_LIES[lie][1])
    with pytest.raises(ProtocolError, match=words), local_cluster(model, [local_host(), liar]):
        pass


@pytest.mark.slow
def test_the_answer_is_the_same_after_a_lie(model: Path, tmp_path: Path) -> None:
    command_line = CommandLine(tmp_path / "home")
    hosts = tmp_path / "hosts.json"
    answers = []
    for python in (None, lying_python(tmp_path / "liar", "token")):
        entries: list[dict[str, object]] = [{"ssh": "127.0.0.1", "ips": ["127.0.0.1"]} for _ in range(2)]
        entries[1] |= {} if python is None else {"python": python}
        hosts.write_text(json.dumps(entries))
        options = ("--hostfile", str(hosts), "--model", str(model), "--raw", "--seed", "1", "--max-tokens", "20")
        answers.append(command_line.run("generate", *options, "Hello"))
    undisturbed, disturbed = answers
    assert disturbed.returncode == 0, disturbed.stderr
    assert disturbed.stdout == undisturbed.stdout
    assert f"stage 1 on this machine {LIES['token']}" in disturbed.stderr
    assert "all stages start again" in disturbed.stderr and "Traceback" not in disturbed.stderr
