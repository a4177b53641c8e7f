"""The index of a checkpoint: the file of each tensor. Checks names and headers against the config. Reads no tensor."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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

_ORIGINAL_REPOS: Mapping[Family, str] = {
    Family.KIMI_K2: "moonshotai/Kimi-K2-Thinking (594 GB)",
    Family.KIMI_K25: "moonshotai/Kimi-K2.5 (595 GB)",
}
# Beginnings or ends of the names of tensors that are not read, and the part of the model that they belong to.
_UNREAD_TENSORS: Mapping[str, str] = {
    "vision_tower.": "the vision tower",
    "vision_model.": "the vision tower",
    "mm_projector.": "the vision projector",
    "multi_modal_projector.": "the vision projector",
    ".rotary_emb.inv_freq": "rotary frequencies",
}


class _NumberRange(NamedTuple):
    """File names that differ in their number only: ``prefix``, then ``first`` to ``last``, then ``suffix``.

    ``first`` keeps its leading zeros.
    """

    prefix: str
    first: str
    last: int
    suffix: str


def file_ranges(names: Iterable[str]) -> str:
    """Return names of numbered files in short, as a shell expands them: model-{00003..00007}-of-000062.safetensors."""
    parts: list[str] = []
    ranges: list[_NumberRange] = []
    for name in sorted(names):
        match = re.fullmatch(r"(.*?-)(\d+)(-of-.*)", name)
        if match is None:
            parts.append(name)
            continue
        prefix, digits, suffix = match.groups()
        if ranges and ranges[-1] == (prefix, ranges[-1].first, int(digits) - 1, suffix):
            ranges[-1] = ranges[-1]._replace(last=int(digits))
        else:
            ranges.append(_NumberRange(prefix, digits, int(digits), suffix))
    for prefix, first, last, suffix in ranges:
        numbers = first if int(first) == last else f"{{{first}..{last:0{len(first)}}}}"
        parts.append(f"{prefix}{numbers}{suffix}")
    return ", ".join(parts)


class _IndexFile(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class CheckpointIndex(msgspec.Struct, frozen=True):
    """The name of each tensor's file, by tensor name. ``source`` names the index in errors."""

    weight_map: Mapping[str, str]
    source: str

    @classmethod
    def from_json(cls, data: bytes, source: str) -> "CheckpointIndex":
        """Parse the bytes of model.safetensors.index.json.

        Raises:
            CheckpointError: ``data`` is not an index of safetensors files, or names files outside its own folder.
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
        """Return the names of the files that hold ``specs``, sorted, each with its part of ``specs``.

        Raises:
            CheckpointError: the index does not name one of the tensors.
        """
        specs_by_file: defaultdict[str, list[TensorSpec]] = defaultdict(list)
        for spec in specs:
            if spec.name not in self.weight_map:
                raise CheckpointError(f"{self.source} does not name {spec.name}: the checkpoint is incomplete")
            specs_by_file[self.weight_map[spec.name]].append(spec)
        return {file: tuple(specs_by_file[file]) for file in sorted(specs_by_file)}


def read_index_json(folder: Path) -> bytes:
    """Return the folder's index as JSON. If it has none, build one from the header of model.safetensors.

    Raises:
        CheckpointError: the folder has neither of the two files, or a file cannot be read.
    """
    path, single_file = folder / INDEX_NAME, folder / SINGLE_FILE_NAME
    try:
        with open_regular(path) as file:
            return file.read()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not single_file.exists():
        raise CheckpointError(f"{folder} holds no weights: neither {INDEX_NAME} nor {SINGLE_FILE_NAME} is there")
    names = sorted(read_header(single_file).tensors)
    return msgspec.json.encode({"weight_map": dict.fromkeys(names, SINGLE_FILE_NAME)})


def model_digest(config_json: bytes, index_json: bytes) -> str:
    """Return a digest of a model's config and index. It is equal on two hosts whose copies are the same."""
    config_digest, index_digest = (hashlib.sha256(data).digest() for data in (config_json, index_json))
    return hashlib.sha256(config_digest + index_digest).hexdigest()


def check_names(config: ModelConfig, index: CheckpointIndex) -> str | None:
    """Compare the index's tensor names with the names that ``config`` requires.

    Return one line for the user about vision tensors that are not read; None if there are none.

    Raises:
        CheckpointError: the layout is not the original one, tensors are missing, or tensors are unknown.
    """
    names = index.weight_map.keys()
    _refuse_other_layouts(names, config, index.source)
    needed = [spec.name for spec in model_specs(config)]
    missing = [name for name in needed if name not in names]
    refuse_names(missing, f"{index.source} lacks", "that config.json requires")
    owners = {name: _owner_of_unread(name) for name in names - set(needed)}
    unknown = sorted(name for name, owner in owners.items() if owner is None)
    reason = "config.json and the weights are not of the same model, or mlx-k2 does not know this variant"
    refuse_names(unknown, f"{index.source} names", f"that config.json does not require: {reason}")
    vision_owners = [owner for owner in owners.values() if owner is not None and "vision" in owner]
    if not vision_owners:
        return None
    parts = ", ".join(sorted(set(vision_owners)))
    return f"{len(vision_owners)} tensors are not needed for text and are not read: {parts}"


def _owner_of_unread(name: str) -> str | None:
    """Return the part of the model that an unread tensor belongs to; None for an unknown tensor."""
    owners = (owner for text, owner in _UNREAD_TENSORS.items() if name.startswith(text) or name.endswith(text))
    return next(owners, None)


def check_file(path: Path, specs: Sequence[TensorSpec]) -> Header:
    """Check names, dtypes and shapes of ``specs`` against the header of ``path``; return the header.

    Raises:
        CheckpointError: the header cannot be read, or a tensor does not match; names the file, and the tensor.
    """
    header = read_header(path)
    for spec in specs:
        stored = header.tensors.get(spec.name)
        if stored is None:
            raise CheckpointError(f"{path} does not hold {spec.name}, which the index names; fetch it again")
        if stored.dtype not in spec.accepted_dtypes:
            raise CheckpointError(f"{path}: {spec.name} is {stored.dtype}, and the model needs {spec.dtype}")
        if stored.shape != spec.shape:
            actual, needed = list(stored.shape), list(spec.shape)
            raise CheckpointError(f"{path}: {spec.name} has shape {actual}, and config.json requires {needed}")
    return header


def _refuse_other_layouts(names: Iterable[str], config: ModelConfig, source: str) -> None:
    advice = f"fetch the original instead, for instance {_ORIGINAL_REPOS[config.family]}"
    for name in names:
        if ".switch_mlp." in name:
            raise CheckpointError(f"{source} names {name}: this checkpoint was converted for MLX; {advice}")
        if name.endswith(".weight_scale_inv"):
            raise CheckpointError(f"{source} names {name}: FP8 weights cannot be read; {advice}")


def refuse_names(names: Sequence[str], beginning: str, ending: str) -> None:
    """Raise a CheckpointError if there are ``names``. Its text has the first of them between the two given texts."""
    if names:
        tensors = f"{names[0]} and {len(names) - 1} more tensors" if len(names) > 1 else f"the tensor {names[0]}"
        raise CheckpointError(f"{beginning} {tensors} {ending}")
