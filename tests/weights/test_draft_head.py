"""Tests of a draft head's files: every wrong head is refused with one sentence before anything is loaded."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_k2.config import ModelConfig
from mlx_k2.errors import MlxK2Error
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.random_draft_head import draft_config_fields, write_random_draft_head
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.weights.checkpoint import read_small_files
from mlx_k2.weights.draft_head import LM_HEAD, DraftDescription, describe_draft, kept_rows
from mlx_k2.weights.index import CONFIG_NAME, INDEX_NAME, SINGLE_FILE_NAME
from mlx_k2.weights.known_layout import thinking_config_fields
from mlx_k2.weights.model_files import read_draft
from mlx_k2.weights.model_source import DraftHead, ModelSource
from tests.advice import follows_advice

FIELDS = tiny_config_fields(192, hidden_size=64, num_attention_heads=2, intermediate_size=96)


def config_of(fields: dict[str, Any]) -> ModelConfig:
    return ModelConfig.from_json(json.dumps(fields).encode(), "the target")


TARGET = config_of(FIELDS)
Change = Callable[[Path], None]


def read(folder: Path, **options: Any) -> DraftDescription:
    """Read and check a head in a local folder as a stage does before it loads anything."""
    head = DraftHead(source=ModelSource(path_or_repo=str(folder)), **options)
    return read_draft(head, TARGET).draft


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the function that writes a head with changed fields."""
    base = tmp_path_factory.mktemp("heads")

    def write(**changes: Any) -> Path:
        folder = base / str(len(list(base.iterdir())))
        write_random_draft_head(folder, draft_config_fields(FIELDS, **changes), TARGET, 1)
        return folder

    return write


def changed(**changes: Any) -> Change:
    """Return a change of config.json's fields."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / CONFIG_NAME).read_bytes())
        (folder / CONFIG_NAME).write_text(json.dumps(fields | changes))

    return change


def truncated(folder: Path) -> None:
    path = folder / SINGLE_FILE_NAME
    path.write_bytes(path.read_bytes()[:-100])


def without_weights(folder: Path) -> None:
    (folder / SINGLE_FILE_NAME).unlink()


def renamed(before: bytes, after: bytes) -> Change:
    """Return a change of a tensor's name in the header, to one of the same length."""
    assert len(before) == len(after)

    def change(folder: Path) -> None:
        path = folder / SINGLE_FILE_NAME
        data = path.read_bytes()
        assert data.count(before) == 1
        path.write_bytes(data.replace(before, after))

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (changed(hidden_size=128), "hidden_size is 128, and the model has 64: the head is for another model"),
        (changed(vocab_size=256), "vocab_size is 256, and the model has 192: the head is for another model"),
        (changed(num_hidden_layers=2), "the head has 2 layers, and mlx-k2 runs heads of one"),
        (changed(architectures=["LlamaForCausalLMEagle3"]), "is not a draft head that mlx-k2 runs"),
        (changed(architectures=None), "architectures None is not a draft head"),
        (changed(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 7]}), "and the model's are 0 to 6"),
        (changed(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 1, 2]}), "each layer once"),
        (changed(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2]}), "fc.weight has shape [64, 192]"),
        (changed(eagle_config={"use_mtp_layernorm": True}), "use_mtp_layernorm True is not implemented"),
        (changed(eagle_config=[]), None),
        (changed(eagle_config="x"), "eagle_config is not an object"),
        (changed(rope_scaling=None), "rope_scaling is missing"),
        (changed(quantization_config={"quant_method": "fp8"}), "quantized draft heads cannot be read"),
        (changed(draft_vocab_size=100), "lacks the tensor d2t that its config.json requires"),
        (changed(draft_vocab_size=1000), "draft_vocab_size 1000 is above 192"),
        (changed(kv_lora_rank=32), "has shape"),
        (changed(hidden_size="64"), "hidden_size"),
        (renamed(b"fc.weight", b"fd.weight"), "lacks the tensor fc.weight"),
        (renamed(b"layers.0.hidden_norm", b"layers.1.hidden_norm"), "lacks the tensor layers.0.hidden_norm.weight"),
        (truncated, "is truncated: 100 of its"),
        (without_weights, "holds no weights"),
    ],
)
def test_a_wrong_head_is_refused_with_one_sentence(
    written: Callable[..., Path], change: Change, sentence: str | None
) -> None:
    folder = written()
    change(folder)
    if sentence is None:
        read(folder)
        return
    with pytest.raises(MlxK2Error) as refused:
        read(folder)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_unknown_tensor_is_refused_by_name(written: Callable[..., Path]) -> None:
    folder = written()
    index = json.loads(read_small_files(folder)[INDEX_NAME])
    index["weight_map"]["layers.1.mlp.up_proj.weight"] = SINGLE_FILE_NAME
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(MlxK2Error, match=r"has the tensor layers\.1\.mlp\.up_proj\.weight that mlx-k2 does not know"):
        read(folder)


@pytest.mark.parametrize("layers", [(), (1, 2, 7), (3, 2, 1), (2, 2, 3)])
def test_aux_layers_on_the_command_line_must_be_the_models(
    written: Callable[..., Path], layers: tuple[int, ...]
) -> None:
    with pytest.raises(MlxK2Error, match="--draft-aux"):
        read(written(), aux_layers=layers)


def test_aux_layers_come_from_the_command_line_then_the_config_then_the_default(written: Callable[..., Path]) -> None:
    assert read(written(), aux_layers=(0, 3, 6)).aux_layers == (0, 3, 6)
    eagle_config = {"eagle_aux_hidden_state_layer_ids": [4, 5, 0]}
    assert read(written(eagle_config=eagle_config)).aux_layers == (0, 4, 5)
    folder = written()
    changed(eagle_config={})(folder)
    assert read(folder).aux_layers == (1, 2, 3)  # 1, layers / 2 - 1, layers - 4


@follows_advice(
    "--draft-vocab 193: head has 192 tokens: give at most as many",
    "--draft-aux 3,2,1: give each layer once, in ascending order, and at least one",
    "config.json: quantized draft heads cannot be read: give one in bfloat16",
)
def test_a_head_that_follows_the_advice_of_its_refusal_is_read(written: Callable[..., Path]) -> None:
    with pytest.raises(MlxK2Error, match=r"--draft-vocab 193: .* has 192 tokens: give at most as many"):
        read(written(), vocab_size=193)
    assert read(written(), vocab_size=192).num_drafted_ids == 192
    with pytest.raises(
        MlxK2Error, match="--draft-aux 3,2,1: give each layer once, in ascending order, and at least one"
    ):
        read(written(), aux_layers=(3, 2, 1))
    assert read(written(), aux_layers=(1, 2, 3)).aux_layers == (1, 2, 3)
    quantized = written()
    changed(quantization_config={"quant_method": "fp8"})(quantized)
    with pytest.raises(MlxK2Error, match="quantized draft heads cannot be read: give one in bfloat16"):
        read(quantized)
    assert {spec.dtype for spec in read(written()).layer_specs()} == {"BF16"}


def test_kept_rows_are_those_of_the_smallest_ids_and_of_control_tokens() -> None:
    assert kept_rows(range(100), 16, 100) == [*range(14), 98, 99]
    assert kept_rows(range(100), 100, 100) == list(range(100))
    assert kept_rows([5, 90, 7, 99], 3, 100) == [0, 1, 2]


def test_a_head_of_kimi_k2_reads_the_published_bytes() -> None:
    """The table of published heads: 1.841e9 parameters; 3.68, 1.96 and 1.04 GB in 16, 8 and 4 bits; 32,000 tokens."""
    fields = thinking_config_fields()
    target = config_of(fields)

    def bytes_per_draft(bits: int | None, vocab_size: int | None) -> float:
        config = draft_config_fields(fields, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 29, 57]})
        names = dict.fromkeys((LM_HEAD, "layers.0.hidden_norm.weight"), SINGLE_FILE_NAME)
        files = {CONFIG_NAME: json.dumps(config).encode(), INDEX_NAME: json.dumps({"weight_map": names}).encode()}
        head = DraftHead(source=ModelSource(path_or_repo="head"), bits=bits, vocab_size=vocab_size)
        draft = describe_draft(files, head, target, check_names=False)
        slices = len(draft.aux_layers) * draft.slice_bytes(2, bits)
        return (slices + draft.layer_bytes(2, bits) + draft.projection_bytes(2, bits)) / 1e9

    found = {(bits, vocab): bytes_per_draft(bits, vocab) for bits in (None, 8, 4) for vocab in (None, 32000)}
    assert math.isclose(found[None, None], 3.68, abs_tol=0.005)
    assert math.isclose(found[8, None], 1.96, abs_tol=0.005)
    assert math.isclose(found[4, None], 1.04, abs_tol=0.005)
    assert math.isclose(found[None, 32000], 1.79, abs_tol=0.005)
    assert math.isclose(found[8, 32000], 0.95, abs_tol=0.005)
    assert math.isclose(found[4, 32000], 0.50, abs_tol=0.01)


def test_a_whole_model_is_refused_as_a_draft_head(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", FIELDS, 1, {})
    with pytest.raises(MlxK2Error, match="is not a draft head that mlx-k2 runs"):
        read(tmp_path / "model")
