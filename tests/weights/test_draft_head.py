"""Tests of a draft head's files: a wrong head is refused with one sentence before a tensor is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
from tests.weights.tiny_checkpoints import config_of

FIELDS = tiny_config_fields(vocab_size=192, hidden_size=64, num_attention_heads=2, intermediate_size=96)
TARGET = config_of(FIELDS)
Change = Callable[[Path], None]
"""Function that changes the files in the folder of a head."""


def read_head(folder: Path, **options: Any) -> DraftDescription:
    """Read and check a head in a local folder, as a stage does before it loads the tensors."""
    head = DraftHead(source=ModelSource(path_or_repo=str(folder)), **options)
    return read_draft(head, TARGET).draft


@pytest.fixture(scope="module")
def write_head(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return the function that writes a head with changed fields of config.json and returns its folder."""
    base = tmp_path_factory.mktemp("heads")

    def write(**changes: Any) -> Path:
        folder = base / str(len(list(base.iterdir())))
        write_random_draft_head(folder, draft_config_fields(FIELDS, **changes), TARGET, seed=1)
        return folder

    return write


def change_fields(**changes: Any) -> Change:
    """Return the change that replaces fields of config.json."""

    def change(folder: Path) -> None:
        fields = json.loads((folder / CONFIG_NAME).read_bytes())
        (folder / CONFIG_NAME).write_text(json.dumps(fields | changes))

    return change


def truncate(folder: Path) -> None:
    path = folder / SINGLE_FILE_NAME
    path.write_bytes(path.read_bytes()[:-100])


def remove_weights(folder: Path) -> None:
    (folder / SINGLE_FILE_NAME).unlink()


def rename_tensor(before: bytes, after: bytes) -> Change:
    """Return the change of a tensor's name in the header to a name of the same length."""
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
        (change_fields(hidden_size=128), "hidden_size is 128, and the model has 64: the head is for another model"),
        (change_fields(vocab_size=256), "vocab_size is 256, and the model has 192: the head is for another model"),
        (change_fields(num_hidden_layers=2), "the head has 2 layers, and mlx-k2 runs heads of one"),
        (change_fields(architectures=["LlamaForCausalLMEagle3"]), "is not a draft head that mlx-k2 runs"),
        (change_fields(architectures=None), "architectures None is not a draft head"),
        (change_fields(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 7]}), "and the model's are 0 to 6"),
        (change_fields(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 1, 2]}), "each layer once"),
        (change_fields(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2]}), "fc.weight has shape [64, 192]"),
        (change_fields(eagle_config={"use_mtp_layernorm": True}), "use_mtp_layernorm True is not implemented"),
        (change_fields(eagle_config="x"), "eagle_config is not an object"),
        (change_fields(rope_scaling=None), "rope_scaling is missing"),
        (change_fields(quantization_config={"quant_method": "fp8"}), "quantized draft heads cannot be read"),
        (change_fields(draft_vocab_size=100), "lacks the tensor d2t that its config.json requires"),
        (change_fields(draft_vocab_size=1000), "draft_vocab_size 1000 is above vocab_size 192"),
        (change_fields(kv_lora_rank=32), "has shape"),
        (change_fields(hidden_size="64"), "hidden_size"),
        (rename_tensor(b"fc.weight", b"fd.weight"), "lacks the tensor fc.weight"),
        (
            rename_tensor(b"layers.0.hidden_norm", b"layers.1.hidden_norm"),
            "lacks the tensor layers.0.hidden_norm.weight",
        ),
        (truncate, "is truncated: 100 of its"),
        (remove_weights, "holds no weights"),
    ],
)
def test_a_wrong_head_is_refused_with_one_sentence(
    write_head: Callable[..., Path], change: Change, sentence: str
) -> None:
    folder = write_head()
    change(folder)
    with pytest.raises(MlxK2Error) as refused:
        read_head(folder)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_an_empty_list_as_eagle_config_means_no_settings(write_head: Callable[..., Path]) -> None:
    folder = write_head()
    change_fields(eagle_config=[])(folder)
    read_head(folder)


def test_an_unknown_tensor_is_refused_by_name(write_head: Callable[..., Path]) -> None:
    folder = write_head()
    index = json.loads(read_small_files(folder)[INDEX_NAME])
    index["weight_map"]["layers.1.mlp.up_proj.weight"] = SINGLE_FILE_NAME
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(MlxK2Error, match=r"has the tensor layers\.1\.mlp\.up_proj\.weight that mlx-k2 does not know"):
        read_head(folder)


@pytest.mark.parametrize("layers", [(), (1, 2, 7), (3, 2, 1), (2, 2, 3)])
def test_aux_layers_on_the_command_line_must_be_layers_of_the_model_in_ascending_order(
    write_head: Callable[..., Path], layers: tuple[int, ...]
) -> None:
    with pytest.raises(MlxK2Error, match="--draft-aux"):
        read_head(write_head(), aux_layers=layers)


def test_aux_layers_come_from_the_command_line_then_the_config_then_the_default(
    write_head: Callable[..., Path],
) -> None:
    assert read_head(write_head(), aux_layers=(0, 3, 6)).aux_layers == (0, 3, 6)
    eagle_config = {"eagle_aux_hidden_state_layer_ids": [4, 5, 0]}
    assert read_head(write_head(eagle_config=eagle_config)).aux_layers == (0, 4, 5)
    folder = write_head()
    change_fields(eagle_config={})(folder)
    num_layers = TARGET.num_hidden_layers
    assert read_head(folder).aux_layers == (1, num_layers // 2 - 1, num_layers - 4)


@follows_advice(
    "--draft-vocab 193: head has 192 tokens: give at most as many",
    "--draft-aux 3,2,1: give each layer once, in ascending order, and at least one",
    "config.json: quantized draft heads cannot be read: give one in bfloat16",
)
def test_a_head_that_follows_the_advice_of_its_refusal_is_read(write_head: Callable[..., Path]) -> None:
    with pytest.raises(MlxK2Error, match=r"--draft-vocab 193: .* has 192 tokens: give at most as many"):
        read_head(write_head(), vocab_size=193)
    assert read_head(write_head(), vocab_size=192).num_drafted_ids == 192
    with pytest.raises(
        MlxK2Error, match="--draft-aux 3,2,1: give each layer once, in ascending order, and at least one"
    ):
        read_head(write_head(), aux_layers=(3, 2, 1))
    assert read_head(write_head(), aux_layers=(1, 2, 3)).aux_layers == (1, 2, 3)
    quantized = write_head()
    change_fields(quantization_config={"quant_method": "fp8"})(quantized)
    with pytest.raises(MlxK2Error, match="quantized draft heads cannot be read: give one in bfloat16"):
        read_head(quantized)
    assert {spec.dtype for spec in read_head(write_head()).layer_specs()} == {"BF16"}


def test_the_rows_of_the_smallest_ids_and_of_control_tokens_are_kept() -> None:
    assert kept_rows(range(100), num_rows=16, vocab_size=100) == [*range(14), 98, 99]
    assert kept_rows(range(100), num_rows=100, vocab_size=100) == list(range(100))
    assert kept_rows([5, 90, 7, 99], num_rows=3, vocab_size=100) == [0, 1, 2]  # an eighth of 3 rows is none


def test_a_head_of_kimi_k2_reads_the_published_bytes() -> None:
    """The published head has 1.841e9 parameters: 3.68, 1.96 and 1.04 GB in 16, 8 and 4 bits.

    With --draft-vocab 32000 only these rows of its output projection are read.
    """
    fields = thinking_config_fields()
    target = config_of(fields)

    def gigabytes_per_draft(bits: int | None, vocab_size: int | None) -> float:
        config = draft_config_fields(fields, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 29, 57]})
        names = {LM_HEAD: SINGLE_FILE_NAME}  # the head has an output projection of its own
        files = {CONFIG_NAME: json.dumps(config).encode(), INDEX_NAME: json.dumps({"weight_map": names}).encode()}
        head = DraftHead(source=ModelSource(path_or_repo="head"), bits=bits, vocab_size=vocab_size)
        draft = describe_draft(files, head, target, check_names=False)
        slice_bytes = len(draft.aux_layers) * draft.slice_bytes(2, bits)
        return (slice_bytes + draft.layer_bytes(2, bits) + draft.projection_bytes(2, bits)) / 1e9

    for bits, all_ids_gb, drafted_ids_gb in ((None, 3.68, 1.79), (8, 1.96, 0.95), (4, 1.04, 0.50)):
        assert gigabytes_per_draft(bits, vocab_size=None) == pytest.approx(all_ids_gb, abs=0.005)
        assert gigabytes_per_draft(bits, vocab_size=32000) == pytest.approx(drafted_ids_gb, abs=0.01)


def test_a_checkpoint_of_a_model_is_refused_as_a_draft_head(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "model", FIELDS, seed=1, tokenizer_files={})
    with pytest.raises(MlxK2Error, match="is not a draft head that mlx-k2 runs"):
        read_head(tmp_path / "model")
