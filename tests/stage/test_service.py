"""Tests of a stage's answers to the coordinator's messages. The stage runs in this process and writes to a file."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_k2 import __version__
from mlx_k2.errors import ProtocolError
from mlx_k2.protocol.framing import Frame, FrameWriter, Kind, read_frame
from mlx_k2.protocol.messages import (
    Connect,
    Connected,
    Fault,
    FetchFiles,
    FromStage,
    Hello,
    LayerLoaded,
    Load,
    Loaded,
    ModelFiles,
    Prepare,
    Prepared,
    Step,
    StepDone,
    Stop,
    ToStage,
    decode_from_stage,
    encode_message,
)
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.stage.service import StageService
from mlx_k2.weights.model_source import ModelSource
from tests.local_cluster import NUM_LAYERS, write_model

Converse = Callable[..., tuple[int, list[FromStage]]]
CONNECT = Connect(links=None, to_next=None, from_previous=None)  # the only stage has no neighbours
LOAD = Load(first_layer=0, end_layer=NUM_LAYERS, dtype="float32", num_slots=1, context_tokens=64, needed_bytes=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def converse(tmp_path: Path) -> Converse:
    """Return a function that sends messages to a new stage and returns its exit code and its answers."""

    def send_all(*messages: ToStage) -> tuple[int, list[FromStage]]:
        output = tmp_path / "frames"
        writer = FrameWriter(output.open("wb"), "the guard")
        service = StageService(writer)
        for message in messages:
            service.on_frame(Frame(Kind.MESSAGE, encode_message(message)))
        exit_code = service.run()
        writer.close(5)
        with output.open("rb") as stream:
            frames = list(iter(lambda: read_frame(stream), None))
        return exit_code, [decode_from_stage(frame.payload) for frame in frames if frame.kind is Kind.MESSAGE]

    return send_all


def prepare(folder: Path) -> Prepare:
    return Prepare(rank=0, num_stages=1, model=ModelSource(path_or_repo=str(folder)), listen=())


def step(number: int, slot: int = 0) -> Step:
    """Return a plan with one token, at position ``number``, after which a token is sampled."""
    return Step(number, (Row(slot, number, (5,), is_prompt=True, sampling=Sampling(seed=1)),))


def test_a_stage_sends_hello_first_and_exits_on_stop(converse: Converse) -> None:
    exit_code, (hello,) = converse(Stop())
    assert exit_code == 0
    assert isinstance(hello, Hello)
    assert hello.mlx_k2_version == __version__
    assert hello.memory_bytes > (hello.working_set_bytes or 0) >= 0


def test_each_message_is_answered_in_order(converse: Converse, model: Path) -> None:
    messages = (prepare(model), CONNECT, LOAD, step(0), step(1), Stop())
    exit_code, answers = converse(*messages)
    assert exit_code == 0
    loading = [*[LayerLoaded] * (NUM_LAYERS + 2), Loaded]  # the layers, embedding and head
    assert [type(answer) for answer in answers] == [Hello, Prepared, Connected, *loading, StepDone, StepDone]
    steps = [answer for answer in answers if isinstance(answer, StepDone)]
    assert [(done.number, len(done.tokens)) for done in steps] == [(0, 1), (1, 1)]


def test_a_loaded_stage_reports_its_held_and_peak_bytes(converse: Converse, model: Path) -> None:
    _, answers = converse(prepare(model), CONNECT, LOAD, Stop())
    piece_bytes = [answer.held_bytes for answer in answers if isinstance(answer, LayerLoaded)]
    (loaded,) = [answer for answer in answers if isinstance(answer, Loaded)]
    assert loaded.held_bytes == sum(piece_bytes) <= loaded.peak_bytes


def test_the_small_files_are_sent_unchanged(converse: Converse, model: Path) -> None:
    _, (_, files) = converse(FetchFiles(ModelSource(path_or_repo=str(model))), Stop())
    assert isinstance(files, ModelFiles)
    assert files.files["config.json"] == (model / "config.json").read_bytes()
    assert "tiktoken.model" in files.files


def test_equal_copies_have_equal_digests_and_a_changed_config_has_another(
    converse: Converse, model: Path, tmp_path: Path
) -> None:
    def digest(folder: Path) -> str:
        _, (_hello, prepared) = converse(prepare(folder), Stop())
        assert isinstance(prepared, Prepared)
        return prepared.model_digest

    copy = shutil.copytree(model, tmp_path / "copy")
    assert digest(copy) == digest(model)
    (copy / "config.json").write_bytes((model / "config.json").read_bytes() + b"\n")
    assert digest(copy) != digest(model)


def test_a_user_error_is_sent_as_a_fault_with_a_readable_message(converse: Converse, tmp_path: Path) -> None:
    exit_code, (_, fault) = converse(prepare(tmp_path / "nowhere"), step(0), Stop())
    assert exit_code == 1
    assert isinstance(fault, Fault)
    assert fault.kind == "CheckpointError"
    assert fault.message.startswith(f"{tmp_path}/nowhere does not exist")


def test_a_truncated_shard_file_is_named_before_any_tensor_is_loaded(converse: Converse, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "damaged")
    shard = folder / "model-00003-of-000008.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    exit_code, answers = converse(prepare(folder), CONNECT, LOAD, Stop())
    assert exit_code == 1
    assert [type(answer) for answer in answers] == [Hello, Prepared, Connected, Fault]
    fault = answers[-1]
    assert isinstance(fault, Fault)
    assert "model-00003-of-000008.safetensors is truncated: 100 of its" in fault.message


def test_a_step_that_does_not_fit_the_stage_is_refused_by_number(converse: Converse, model: Path) -> None:
    exit_code, answers = converse(prepare(model), CONNECT, LOAD, step(0), step(1, slot=1), Stop())
    assert exit_code == 1
    assert answers[-1] == Fault("ProtocolError", "step 1 does not fit this stage: slot 1 of 1")


def test_an_assertion_error_is_sent_as_a_fault_and_its_traceback_is_logged(
    converse: Converse, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code, (_, fault) = converse(step(0), Stop())
    assert exit_code == 1
    assert isinstance(fault, Fault)
    assert fault == Fault("AssertionError", "AssertionError: a step before Load")
    assert "Traceback" in capsys.readouterr().err


def test_a_frame_that_is_not_a_message_is_refused(tmp_path: Path) -> None:
    writer = FrameWriter((tmp_path / "frames").open("wb"), "the guard")
    with pytest.raises(ProtocolError, match="HEARTBEAT"):
        StageService(writer).on_frame(Frame(Kind.HEARTBEAT, b""))
    writer.close(5)
