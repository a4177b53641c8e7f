"""Tests of the checkpoint index, and of the checks of files and headers before a tensor is loaded."""

import contextlib
import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_k2.config import ModelConfig
from mlx_k2.errors import CheckpointError
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import as_kimi_k25, tiny_config_fields
from mlx_k2.weights.checkpoint import locate_tensors, read_small_files
from mlx_k2.weights.index import CheckpointIndex, check_file, check_names, file_ranges, model_digest, read_index_json
from mlx_k2.weights.inventory import TensorSpec, layer_specs, model_specs, shard_specs
from mlx_k2.weights.manifest import identify
from mlx_k2.weights.model_source import ModelSource, is_repo
from mlx_k2.weights.safetensors_file import write_file
from tests.weights.tiny_checkpoints import VOCAB_SIZE, config_of, write_tiny

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner, max_size=3)
    ),
    max_leaves=6,
)
SHARD = "model-00003-of-000008.safetensors"
NORM = TensorSpec("model.norm.weight", "BF16", (8,))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """Return the folder and the config of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return folder, write_tiny(folder)


def index_of(folder: Path) -> CheckpointIndex:
    return CheckpointIndex.from_json(read_index_json(folder), "the index")


def rename_tensors(index: CheckpointIndex, changes: dict[str, str | None]) -> CheckpointIndex:
    """Return the index with new names of some tensors. None removes a tensor."""
    new_names = {name: changes.get(name, name) for name in index.weight_map}
    return CheckpointIndex({new: index.weight_map[old] for old, new in new_names.items() if new}, index.source)


def write_tensor(path: Path, spec: TensorSpec) -> None:
    """Write a file with one tensor of zeros."""
    write_file(path, [spec], lambda spec: [bytes(spec.num_bytes)])


def rewrite_header(path: Path, change: dict[str, Any]) -> None:
    """Replace fields of the entry of NORM in a file's header."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header[NORM.name] |= change
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[end:])


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize(
    "name", ["config.json", "tiktoken.model", "model.safetensors.index.json", SHARD, "mlx-k2-manifest.json"]
)
def test_a_pipe_or_a_device_in_a_checkpoint_is_refused(
    tiny: tuple[Path, ModelConfig], tmp_path: Path, name: str, kind: str
) -> None:
    folder, config = tiny
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=f"cannot read .*{name}: it is not a regular file"):
        # Whichever of these reads the file raises.
        read_small_files(tmp_path)
        locate_tensors(tmp_path, index_of(tmp_path), model_specs(config))
        identify([tmp_path / SHARD])


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 904496\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            LFS_POINTER,
            "it is a Git LFS pointer, because its repository was cloned without git-lfs: install it and run `git -C ",
        ),
        (b"GGUF\x03\0\0\0", "it is a GGUF file, which mlx-k2 does not read: fetch the original checkpoint"),
        (
            b"\n <!DOCTYPE HTML>\n<html>",
            "it is an HTML page, for instance of an error or a login: fetch the file again",
        ),
        (b"<html lang='en'>", "it is an HTML page"),
        (b"<?xml version='1.0'?><Error>", "it is an XML page"),
        (b"PK\x03\x04model/data.pkl", "it is a ZIP archive"),
    ],
    ids=["git-lfs", "gguf", "html", "html without doctype", "xml", "zip"],
)
@pytest.mark.parametrize(
    "name", ["config.json", "tiktoken.model", "tokenizer_config.json", "model.safetensors.index.json", SHARD]
)
def test_the_error_for_a_file_of_another_format_names_the_format(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    folder = tmp_path / "a model's folder"
    config = write_tiny(folder)
    index = index_of(folder)
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        # Whichever of these reads the file raises.
        read_small_files(folder)
        locate_tensors(folder, index, model_specs(config))
    assert f"cannot read {folder / name}: {reason}" in str(refused.value)


def test_the_git_command_for_a_git_lfs_pointer_is_quoted_for_a_shell(tmp_path: Path) -> None:
    folder = tmp_path / "a model's folder"
    write_tiny(folder)
    (folder / SHARD).write_bytes(LFS_POINTER)
    with pytest.raises(CheckpointError) as refused:
        check_file(folder / SHARD, [])
    command = shlex.split(str(refused.value).split("`")[1])
    assert command == ["git", "-C", str(folder), "lfs", "pull"]


def test_a_dtype_that_mlx_lacks_is_refused_only_in_a_tensor_that_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensor(path, NORM)
    rewrite_header(path, {"dtype": "F64", "shape": [2]})
    assert check_file(path, []).tensors[NORM.name].dtype == "F64"
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is F64, and the model needs BF16"):
        check_file(path, [NORM])


@given(
    name=st.from_regex(r"[A-Za-z0-9][\w.-]{0,20}", fullmatch=True),
    kind=st.sampled_from(["file", "folder", "dead link"]),
)
def test_an_existing_path_is_never_a_repository(tmp_path_factory: pytest.TempPathFactory, name: str, kind: str) -> None:
    folder = tmp_path_factory.mktemp("models")
    relative_path = f"owner/{name}"
    with contextlib.chdir(folder):
        assert is_repo(ModelSource(path_or_repo=relative_path))
        Path("owner").mkdir()
        match kind:
            case "file":
                Path(relative_path).touch()
            case "folder":
                Path(relative_path).mkdir()
            case _:
                Path(relative_path).symlink_to("nothing")
        assert not is_repo(ModelSource(path_or_repo=relative_path))


def test_a_folder_of_the_hubs_cache_is_refused_with_the_repositorys_name(tmp_path: Path) -> None:
    folder = tmp_path / "models--moonshotai--Kimi-K2--Thinking"
    (folder / "snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"give --model moonshotai/Kimi-K2--Thinking, or a folder in its snapsh"):
        read_small_files(folder)


def test_a_shard_needs_the_files_of_its_layers_and_no_others(tiny: tuple[Path, ModelConfig]) -> None:
    """File 8 has the embedding, which the first shard needs, and the head, which the last one needs."""
    folder, config = tiny
    index = index_of(folder)
    for layers, numbers in (((0, 3), (1, 2, 3, 8)), ((3, 5), (4, 5)), ((5, 7), (6, 7, 8))):
        names = [f"model-0000{number}-of-000008.safetensors" for number in numbers]
        assert list(index.files(shard_specs(config, *layers))) == names
    last_file = index.files(shard_specs(config, 5, 7))["model-00008-of-000008.safetensors"]
    assert [spec.name for spec in last_file] == ["model.norm.weight", "lm_head.weight"]


def test_every_file_of_an_intact_checkpoint_passes(tiny: tuple[Path, ModelConfig]) -> None:
    folder, config = tiny
    for file, specs in index_of(folder).files(model_specs(config)).items():
        assert {spec.name for spec in specs} <= set(check_file(folder / file, specs).tensors)


def test_a_single_file_checkpoint_without_an_index_is_read(tmp_path: Path) -> None:
    config = config_of(tiny_config_fields(VOCAB_SIZE))
    write_file(tmp_path / "model.safetensors", model_specs(config), lambda spec: [bytes(spec.num_bytes)])
    index = index_of(tmp_path)
    assert list(index.files(shard_specs(config, 0, 1))) == ["model.safetensors"]
    assert check_names(config, index) is None


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        read_index_json(tmp_path)


def test_unread_vision_tensors_are_reported_in_one_line_and_rotary_frequencies_are_ignored(
    tiny: tuple[Path, ModelConfig], tmp_path: Path
) -> None:
    folder, config = tiny
    assert check_names(config, index_of(folder)) is None
    fields = as_kimi_k25(tiny_config_fields(VOCAB_SIZE))
    write_random_checkpoint(tmp_path / "k25", fields, seed=0, tokenizer_files={})
    unread_tensors = "2 tensors are not needed for text and are not read: the vision projector, the vision tower"
    assert check_names(config_of(fields), index_of(tmp_path / "k25")) == unread_tensors


def test_a_missing_tensor_is_named_with_the_number_of_others_that_are_missing(tiny: tuple[Path, ModelConfig]) -> None:
    folder, config = tiny
    without_two = rename_tensors(index_of(folder), {"lm_head.weight": None, "model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"lacks model\.norm\.weight and 1 more tensors"):
        check_names(config, without_two)
    with pytest.raises(CheckpointError, match=r"lacks the tensor lm_head\.weight that"):
        check_names(config, rename_tensors(index_of(folder), {"lm_head.weight": None}))


def test_an_unknown_tensor_is_refused(tiny: tuple[Path, ModelConfig]) -> None:
    folder, config = tiny
    with_extra = CheckpointIndex({**index_of(folder).weight_map, "model.layers.7.eh_proj.weight": "x"}, "the index")
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.eh_proj\.weight that config\.json does not require"):
        check_names(config, with_extra)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.1.mlp.switch_mlp.up_proj.weight", "converted for MLX.*moonshotai/Kimi-K2-Thinking \\(594 GB\\)"),
        ("model.layers.1.mlp.experts.0.up_proj.weight_scale_inv", "FP8.*moonshotai/Kimi-K2-Thinking"),
    ],
)
def test_an_unsupported_layout_is_refused_with_the_repository_to_fetch_instead(
    tiny: tuple[Path, ModelConfig], name: str, reason: str
) -> None:
    folder, config = tiny
    with pytest.raises(CheckpointError, match=reason):
        check_names(config, rename_tensors(index_of(folder), {"lm_head.weight": name}))


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "pickle.bin", ".."])
def test_an_index_cannot_point_outside_its_folder(file: str) -> None:
    with pytest.raises(CheckpointError, match="which is not a"):
        CheckpointIndex.from_json(json.dumps({"weight_map": {"lm_head.weight": file}}).encode(), "the index")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"weight_map": {"a": 1}}', b"\xff"])
def test_an_invalid_index_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="the index is not an index"):
        CheckpointIndex.from_json(data, "the index")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model-00003\.safetensors is missing"):
        check_file(tmp_path / "model-00003.safetensors", [])


@given(num_bytes=st.integers(0, 5_000))
def test_a_file_cut_at_any_byte_is_refused(tmp_path_factory: pytest.TempPathFactory, num_bytes: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    spec = TensorSpec("model.norm.weight", "BF16", (2_500,))
    write_tensor(path, spec)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=r"truncated: .*; fetch|is empty .*: fetch"):
        check_file(path, [spec])


def test_the_error_for_a_truncated_file_gives_the_number_of_missing_bytes(tmp_path: Path) -> None:
    write_tensor(tmp_path / "a.safetensors", NORM)
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:-5])
    with pytest.raises(CheckpointError, match=rf"truncated: 5 of its {len(data)} bytes are missing"):
        check_file(tmp_path / "a.safetensors", [NORM])
    (tmp_path / "a.safetensors").write_bytes(data + b"x")
    with pytest.raises(CheckpointError, match="1 bytes after its last tensor"):
        check_file(tmp_path / "a.safetensors", [NORM])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "F16"}, "model.norm.weight is F16, and the model needs BF16"),
        ({"shape": [4, 2]}, r"model.norm.weight has shape \[4, 2\], and config.json requires \[8\]"),
        ({"data_offsets": [2, 16]}, "model.norm.weight is at bytes 2 to 16, where byte 0 should follow"),
        ({"data_offsets": [0, 15]}, "1 bytes after its last tensor"),
        ({"data_offsets": [0, 17]}, "truncated: 1 of its"),
        ({"shape": "8"}, "its header cannot be read"),
    ],
)
def test_a_tensor_with_a_wrong_header_entry_is_refused(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = tmp_path / "a.safetensors"
    write_tensor(path, NORM)
    rewrite_header(path, change)
    with pytest.raises(CheckpointError, match=reason):
        check_file(path, [NORM])


@given(entry=JSON_VALUES)
def test_any_invalid_header_entry_is_refused(tmp_path_factory: pytest.TempPathFactory, entry: Any) -> None:
    path = tmp_path_factory.mktemp("odd") / "a.safetensors"
    raw = json.dumps({NORM.name: entry}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(16))
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        check_file(path, [NORM])


@given(data=st.binary(max_size=64))
def test_a_file_of_any_bytes_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("odd") / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        check_file(path, [NORM])


def test_a_tensor_whose_bytes_disagree_with_its_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensor(path, TensorSpec(NORM.name, "BF16", (9,)))
    rewrite_header(path, {"shape": [8]})
    with pytest.raises(CheckpointError, match="spans 18 bytes where its shape has 16"):
        check_file(path, [NORM])


def test_a_tensor_that_is_in_another_file_is_refused(tmp_path: Path) -> None:
    write_tensor(tmp_path / "a.safetensors", NORM)
    with pytest.raises(CheckpointError, match=r"a\.safetensors does not hold lm_head\.weight"):
        check_file(tmp_path / "a.safetensors", [TensorSpec("lm_head.weight", "BF16", (8, 8))])


@pytest.mark.parametrize("dtype", ["I32", "I64"])
def test_weight_shape_is_accepted_as_int32_and_int64(tmp_path: Path, dtype: str) -> None:
    config = config_of(tiny_config_fields(VOCAB_SIZE))
    (spec, *_) = [spec for spec in layer_specs(config, 1) if spec.name.endswith("weight_shape")]
    write_tensor(tmp_path / "a.safetensors", TensorSpec(spec.name, dtype, spec.shape))
    check_file(tmp_path / "a.safetensors", [spec])


def test_different_configs_and_indexes_have_different_digests() -> None:
    digests = {model_digest(*pair) for pair in ((b"a", b"b"), (b"ab", b""), (b"", b"ab"), (b"a", b"c"))}
    assert len(digests) == 4
    assert model_digest(b"a", b"b") in digests


@pytest.mark.parametrize(
    ("names", "ranges"),
    [
        ([], ""),
        (["model.safetensors"], "model.safetensors"),
        (["m-00002-of-000003.x", "m-00001-of-000003.x"], "m-{00001..00002}-of-000003.x"),
        (["m-00001-of-000003.x", "m-00003-of-000003.x"], "m-00001-of-000003.x, m-00003-of-000003.x"),
        (["m-9-of-10.x", "m-10-of-10.x", "n-11-of-12.x"], "m-10-of-10.x, m-9-of-10.x, n-11-of-12.x"),
    ],
)
def test_consecutive_numbered_files_are_written_as_a_range(names: list[str], ranges: str) -> None:
    assert file_ranges(names) == ranges


def test_bash_expands_the_ranges_to_the_names() -> None:
    names = [f"model-{number:05}-of-000062.safetensors" for number in (1, 2, 3, 7, 9, 10, 62)]
    command = f"echo {file_ranges(names).replace(', ', ' ')}"
    completed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=10, check=True)
    assert sorted(completed.stdout.split()) == names
