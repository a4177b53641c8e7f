"""A checkpoint on one host: its small files, read and checked, and the files of its tensors. Loads no tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_k2.config import ModelConfig
from mlx_k2.errors import CheckpointError
from mlx_k2.weights.draft_head import DraftDescription
from mlx_k2.weights.index import (
    CONFIG_NAME,
    INDEX_NAME,
    CheckpointIndex,
    check_file,
    check_names,
    file_ranges,
    model_digest,
    read_index_json,
)
from mlx_k2.weights.inventory import TensorSpec
from mlx_k2.weights.safetensors_file import open_regular

TOKENIZER_NAMES = (
    "tiktoken.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class ModelDescription:
    """A model's small files, parsed, and its draft head, if there is one.

    ``unread_tensors``: one line for the user about tensors that are not read.
    """

    files: Mapping[str, bytes]
    config: ModelConfig
    index: CheckpointIndex
    digest: str
    unread_tensors: str | None
    draft: DraftDescription | None = None


def describe_model(files: Mapping[str, bytes], source: str) -> ModelDescription:
    """Parse and check a model's small files by name; ``source`` names the model in errors.

    Raises:
        ConfigError, CheckpointError: a file is missing, or has content that this program does not support.
    """
    for name in (CONFIG_NAME, INDEX_NAME):
        if name not in files:
            raise CheckpointError(f"{source} has no {name}: it is not a Kimi K2 checkpoint in its original layout")
    config = ModelConfig.from_json(files[CONFIG_NAME], f"{source}/{CONFIG_NAME}")
    index = CheckpointIndex.from_json(files[INDEX_NAME], f"{source}/{INDEX_NAME}")
    unread_tensors = check_names(config, index)
    return ModelDescription(files, config, index, model_digest(files[CONFIG_NAME], files[INDEX_NAME]), unread_tensors)


def read_small_files(folder: Path) -> dict[str, bytes]:
    """Return the small files of the checkpoint in ``folder``, by name, without missing TOKENIZER_NAMES.

    Raises:
        CheckpointError: there is no such folder, it holds no config or no weights, or a file cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder of a checkpoint, or a repository on the Hub")
    names = [name for name in (CONFIG_NAME, *TOKENIZER_NAMES) if (folder / name).exists()]
    if CONFIG_NAME not in names:
        raise CheckpointError(f"{folder} holds no {CONFIG_NAME}: {_remedy(folder)}")
    files = {}
    try:
        for name in names:
            with open_regular(folder / name) as file:
                files[name] = file.read()
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from None
    return files | {INDEX_NAME: read_index_json(folder)}


def _remedy(folder: Path) -> str:
    """Return what to give as --model instead of a folder without a config: a name if it is a folder of the Hub's cache.

    huggingface_hub keeps owner/name in a folder models--owner--name.
    """
    kind, _, name = folder.name.partition("--")
    if kind == "models" and (folder / "snapshots").is_dir():
        repo = name.replace("--", "/", 1)
        return f"it is a folder of the Hub's cache: give --model {repo}, or a folder in its snapshots"
    return "it is not a checkpoint"


def locate_tensors(folder: Path, index: CheckpointIndex, specs: Iterable[TensorSpec]) -> dict[str, Path]:
    """Return the path of each tensor of ``specs``, by tensor name; check each file's header against ``specs``.

    Raises:
        CheckpointError: files are missing or truncated, or tensors do not match their specs; names every bad file.
    """
    located: dict[str, Path] = {}
    files = index.files(specs)
    missing = [name for name in files if not (folder / name).exists()]
    problems = [f"{folder / file_ranges(missing)} is missing: fetch it again"] if missing else []
    for name in files.keys() - set(missing):
        try:
            check_file(folder / name, files[name])
        except CheckpointError as error:
            problems.append(str(error))
        located |= dict.fromkeys((spec.name for spec in files[name]), folder / name)
    if problems:
        raise CheckpointError("; ".join(sorted(problems)))
    return located
