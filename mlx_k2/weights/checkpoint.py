"""A checkpoint on one host: its small files, read and checked, and the paths of its tensors. Loads no tensor."""

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
"""Files of the tokenizer, the chat template and the recommended sampling, as far as a checkpoint has them."""


@dataclass(frozen=True)
class ModelDescription:
    """A model's small files: config, index, and the files TOKENIZER_NAMES. ``draft`` is its draft head, if it has one.

    ``digest`` identifies config and index (`model_digest`). ``unread_tensors_line`` tells the user which tensors in the
    index are not read; None if all are.
    """

    files: Mapping[str, bytes]
    config: ModelConfig
    index: CheckpointIndex
    digest: str
    unread_tensors_line: str | None
    draft: DraftDescription | None = None


def describe_model(files: Mapping[str, bytes], source: str) -> ModelDescription:
    """Parse and check a model's small ``files``, by name. ``source`` names the model in errors.

    Raises:
        ConfigError, CheckpointError: a file is missing, or its content is not supported.
    """
    for name in (CONFIG_NAME, INDEX_NAME):
        if name not in files:
            raise CheckpointError(f"{source} has no {name}: it is not a Kimi K2 checkpoint in its original layout")
    config = ModelConfig.from_json(files[CONFIG_NAME], f"{source}/{CONFIG_NAME}")
    index = CheckpointIndex.from_json(files[INDEX_NAME], f"{source}/{INDEX_NAME}")
    unread_tensors = check_names(config, index)
    return ModelDescription(files, config, index, model_digest(files[CONFIG_NAME], files[INDEX_NAME]), unread_tensors)


def read_small_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of config, index and the files TOKENIZER_NAMES, by name, as far as ``folder`` has them.

    Raises:
        CheckpointError: there is no such folder, it has no config or no weights, or a file cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder of a checkpoint, or a repository on the Hub")
    names = [name for name in (CONFIG_NAME, *TOKENIZER_NAMES) if (folder / name).exists()]
    if CONFIG_NAME not in names:
        raise CheckpointError(f"{folder} holds no {CONFIG_NAME}: {_reason_without_config(folder)}")
    files = {}
    try:
        for name in names:
            with open_regular(folder / name) as file:
                files[name] = file.read()
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from None
    return files | {INDEX_NAME: read_index_json(folder)}


def _reason_without_config(folder: Path) -> str:
    """Return why ``folder`` has no config.json, and for a repository in the Hub's cache what to give as --model.

    huggingface_hub caches the repository owner/name in a folder models--owner--name.
    """
    repo_type, _, name = folder.name.partition("--")
    if repo_type == "models" and (folder / "snapshots").is_dir():
        repo = name.replace("--", "/", 1)
        return f"it is a folder of the Hub's cache: give --model {repo}, or a folder in its snapshots"
    return "it is not a checkpoint"


def locate_tensors(folder: Path, index: CheckpointIndex, specs: Iterable[TensorSpec]) -> dict[str, Path]:
    """Return the path of the file of each tensor, by tensor name. Check the header of each file against ``specs``.

    Raises:
        CheckpointError: files are missing or truncated, or tensors do not match ``specs``; names every bad file.
    """
    paths: dict[str, Path] = {}
    specs_by_file = index.files(specs)
    missing = [name for name in specs_by_file if not (folder / name).exists()]
    problems = [f"{folder / file_ranges(missing)} is missing: fetch it again"] if missing else []
    for name in specs_by_file.keys() - set(missing):
        try:
            check_file(folder / name, specs_by_file[name])
        except CheckpointError as error:
            problems.append(str(error))
        paths |= dict.fromkeys((spec.name for spec in specs_by_file[name]), folder / name)
    if problems:
        raise CheckpointError("; ".join(sorted(problems)))
    return paths
