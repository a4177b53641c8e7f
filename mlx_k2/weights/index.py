"""The file of each tensor, and the checks that files hold what the config requires. Reads headers, never a tensor."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from mlx_k2.config import Family, ModelConfig
from mlx_k2.errors import CheckpointError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import read_json
from mlx_k2.weights.inventory import TensorSpec, model_specs
from mlx_k2.weights.safetensors_file import Header, open_regular, read_header

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_FILE_NAME = "model.safetensors"

_ORIGINALS: Mapping[Family, str] = {
    Family.KIMI_K2: "moonshotai/Kimi-K2-Thinking (594 GB)",
    Family.KIMI_K25: "moonshotai/Kimi-K2.5 (595 GB)",
}
# MLX opens a file only if it can read every tensor in it, also those that no stage needs.
_MLX_DTYPES = frozenset(
    ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "C64", "F8_E4M3", "F8_E8M0")
)
_UNNEEDED: Mapping[str, str] = {
    "vision_tower.": "the vision tower",
    "vision_model.": "the vision tower",
    "mm_projector.": "the vision projector",
    "multi_modal_projector.": "the vision projector",
    ".rotary_emb.inv_freq": "rotary frequencies",
}


def file_ranges(names: Iterable[str]) -> str:
    """Return names of numbered files in short, as a shell expands them: model-{00003..00007}-of-000062.safetensors."""
    shown: list[str] = []
    runs: list[tuple[str, str, int, int, str]] = []  # before the number, its first digits, first, last, after it
    for name in sorted(names):
        found = re.fullmatch(r"(.*?-)(\d+)(-of-.*)", name)
        if found is None:
            shown.append(name)
            continue
        before, digits, after = found.groups()
        if runs and runs[-1][0] == before and runs[-1][4] == after and runs[-1][3] + 1 == int(digits):
            runs[-1] = (*runs[-1][:3], int(digits), after)
        else:
            runs.append((before, digits, int(digits), int(digits), after))
    for before, digits, first, last, after in runs:
        number = digits if first == last else f"{{{digits}..{last:0{len(digits)}}}}"
        shown.append(f"{before}{number}{after}")
    return ", ".join(shown)


class _IndexFile(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class CheckpointIndex(msgspec.Struct, frozen=True):
    """The file of each tensor; ``source`` names the index in errors."""

    weight_map: Mapping[str, str]
    source: str

    @classmethod
    def from_json(cls, data: bytes, source: str) -> "CheckpointIndex":
        """Parse the bytes of model.safetensors.index.json.

        Raises:
            CheckpointError: the bytes are not such an index, or it names files outside its own folder.
        """
        try:
            weight_map = read_json(data, _IndexFile).weight_map
        except JsonError as error:
            raise CheckpointError(f"{source} is not an index of safetensors files: {error}") from None
        for file in set(weight_map.values()):
            if Path(file).name != file or "\\" in file or not file.endswith(".safetensors"):
                raise CheckpointError(f"{source} names {file!r}, which is not a .safetensors file in its folder")
        return cls(weight_map, source)

    def files(self, specs: Iterable[TensorSpec]) -> dict[str, tuple[TensorSpec, ...]]:
        """Return the files that hold ``specs``, sorted by name, each with the specs that it holds.

        Raises:
            CheckpointError: the index does not name one of the tensors.
        """
        found: defaultdict[str, list[TensorSpec]] = defaultdict(list)
        for spec in specs:
            if spec.name not in self.weight_map:
                raise CheckpointError(f"{self.source} does not name {spec.name}: the checkpoint is incomplete")
            found[self.weight_map[spec.name]].append(spec)
        return {file: tuple(found[file]) for file in sorted(found)}


def read_index_json(folder: Path) -> bytes:
    """Return the folder's index as JSON; build it from the header of model.safetensors if there is only that file.

    Raises:
        CheckpointError: the folder has neither, or they cannot be read.
    """
    path, single = folder / INDEX_NAME, folder / SINGLE_FILE_NAME
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not single.exists():
        raise CheckpointError(f"{folder} holds no weights: neither {INDEX_NAME} nor {SINGLE_FILE_NAME} is there")
    names = sorted(read_header(single).tensors)
    return msgspec.json.encode({"weight_map": dict.fromkeys(names, SINGLE_FILE_NAME)})


def model_digest(config_json: bytes, index_json: bytes) -> str:
    """Return a digest that is equal on two hosts if their copies of the model's config and index are the same."""
    config_digest, index_digest = (hashlib.sha256(data).digest() for data in (config_json, index_json))
    return hashlib.sha256(config_digest + index_digest).hexdigest()


def check_names(config: ModelConfig, index: CheckpointIndex) -> str | None:
    """Compare the index's tensor names with those that ``config`` requires.

    Return one line for the user about vision tensors that are not read; None if there are none.

    Raises:
        CheckpointError: the layout is another one, tensors are missing, or tensors are unknown to the program.
    """
    names = index.weight_map.keys()
    _refuse_other_layouts(names, config, index.source)
    needed = [spec.name for spec in model_specs(config)]
    missing = [name for name in needed if name not in names]
    refuse_names(missing, f"{index.source} lacks", "that config.json requires")
    others = names - set(needed)
    kinds = {
        name: next((kind for part, kind in _UNNEEDED.items() if name.startswith(part) or name.endswith(part)), None)
        for name in others
    }
    unknown = sorted(name for name, kind in kinds.items() if kind is None)
    other = "config.json and the weights are not of the same model, or mlx-k2 does not know this variant"
    refuse_names(unknown, f"{index.source} names", f"that config.json does not require: {other}")
    vision = {name: kind for name, kind in kinds.items() if kind and "vision" in kind}
    listed = ", ".join(sorted(set(vision.values())))
    return f"{len(vision)} tensors are not needed for text and are not read: {listed}" if vision else None


def check_file(path: Path, specs: Sequence[TensorSpec]) -> Header:
    """Check names, dtypes, shapes and lengths of ``specs`` against the header of ``path``; return the header.

    Raises:
        CheckpointError: the header cannot be read, or a tensor does not match; names the file and the tensor.
    """
    header = read_header(path)
    for name, tensor in header.tensors.items():
        if tensor.dtype not in _MLX_DTYPES:
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, which MLX cannot read: fetch the original file")
    for spec in specs:
        stored = header.tensors.get(spec.name)
        if stored is None:
            raise CheckpointError(f"{path} does not hold {spec.name}, which the index names; fetch it again")
        if stored.dtype not in spec.accepted_dtypes:
            raise CheckpointError(f"{path}: {spec.name} is {stored.dtype}, and the model needs {spec.dtype}")
        if stored.shape != spec.shape:
            found, needed = list(stored.shape), list(spec.shape)
            raise CheckpointError(f"{path}: {spec.name} has shape {found}, and config.json requires {needed}")
    return header


def _refuse_other_layouts(names: Iterable[str], config: ModelConfig, source: str) -> None:
    fetch = f"fetch the original instead, for instance {_ORIGINALS[config.family]}"
    for name in names:
        if ".switch_mlp." in name:
            raise CheckpointError(f"{source} names {name}: this checkpoint was converted for MLX; {fetch}")
        if name.endswith(".weight_scale_inv"):
            raise CheckpointError(f"{source} names {name}: FP8 weights cannot be read; {fetch}")


def refuse_names(names: Sequence[str], what: str, why: str) -> None:
    """Raise a CheckpointError with the first of some tensors and how many follow it, if there are any."""
    if names:
        listed = f"{names[0]} and {len(names) - 1} more tensors" if len(names) > 1 else f"the tensor {names[0]}"
        raise CheckpointError(f"{what} {listed} {why}")
