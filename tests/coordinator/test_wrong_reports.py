"""Tests of a stage that sends a message that no correct one sends: the error names it, and the stages start again."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from mlx_k2.errors import ClusterError, ProtocolError
from tests.cli.command import CommandLine
from tests.coordinator.misreporting_stage import WRONG_REPORTS, WRONG_START_MESSAGES, misreporting_python
from tests.local_cluster import local_cluster, local_host, request, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG_REPORTS)
def test_a_wrong_report_of_a_step_is_an_error_that_names_the_stage_and_the_report(
    model: Path, tmp_path: Path, name: str
) -> None:
    host = msgspec.structs.replace(local_host(), python=misreporting_python(tmp_path / "stage", name))
    with local_cluster(model, [local_host(), host]) as cluster, pytest.raises(ClusterError) as caught:
        cluster.tokens(request(8, 40))
    assert re.match(r"stage 1 on this machine .*" + re.escape(WRONG_REPORTS[name]), str(caught.value))


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG_START_MESSAGES)
def test_a_wrong_message_during_the_start_is_an_error_that_names_the_stage_and_the_message(
    model: Path, tmp_path: Path, name: str
) -> None:
    host = msgspec.structs.replace(local_host(), python=misreporting_python(tmp_path / "stage", name))
    pattern = r"stage 1 on this machine .*" + re.escape(WRONG_START_MESSAGES[name][2])
    with pytest.raises(ProtocolError, match=pattern), local_cluster(model, [local_host(), host]):
        pass


@pytest.mark.slow
def test_an_answer_continues_with_the_same_tokens_after_a_wrong_report(model: Path, tmp_path: Path) -> None:
    command_line = CommandLine(tmp_path / "home")
    hostfile = tmp_path / "hosts.json"
    host = {"ssh": "127.0.0.1", "ips": ["127.0.0.1"]}
    misreporting_host = host | {"python": misreporting_python(tmp_path / "stage", "large-token-id")}
    results = []
    for second_host in (host, misreporting_host):
        hostfile.write_text(json.dumps([host, second_host]))
        options = ("--hostfile", str(hostfile), "--model", str(model), "--raw", "--seed", "1", "--max-tokens", "20")
        results.append(command_line.run("generate", *options, "Hello"))
    undisturbed, disturbed = results
    assert disturbed.returncode == 0, disturbed.stderr
    assert disturbed.stdout == undisturbed.stdout
    assert f"stage 1 on this machine {WRONG_REPORTS['large-token-id']}" in disturbed.stderr
    assert "all stages start again" in disturbed.stderr and "Traceback" not in disturbed.stderr
