"""The reader of one stage's tensors from the checkpoint's safetensors files into mlx arrays, one layer at a time.

Nothing is converted on disk. Routed experts stay as shipped, stacked: packed INT4 words and bfloat16 scales, 4.5 bits
per weight. All other tensors are cast to the compute dtype, except the router's correction bias, which stays float32.
At most the size of one layer is used beyond the tensors that stay in memory.

A part is read in three steps: its arrays are allocated and evaluated, its bytes are read straight into them by several
threads, each byte once, and only then is anything computed from them. So no GPU work ever waits for a disk: macOS ends
GPU work that waits for seconds (docs/design/0102).
"""

import fcntl
import math
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

import mlx.core as mx
import numpy as np

from mlx_k2.config import ModelConfig
from mlx_k2.errors import CheckpointError
from mlx_k2.weights.index import check_file
from mlx_k2.weights.inventory import TensorSpec, embedding_specs, head_specs, layer_specs
from mlx_k2.weights.safetensors_file import Header, open_regular

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ALWAYS_CHECKED = ("norm.weight", "mlp.gate.weight", "e_score_correction_bias", "embed_tokens.weight")
_READING_THREADS = 8
_PIECE_BYTES = 32 * 2**20
_F_NOCACHE = 48
"""macOS: read without keeping the file's pages in memory. 300 GB of pages would displace the weights."""
_STORED = {"BF16": mx.uint16, "F32": mx.float32, "I64": mx.int64}
"""The dtype of an array that has a tensor's bytes: Python's buffers have no bfloat16."""


class LoadedTensors(NamedTuple):
    """Evaluated tensors by short name, and the names of the checkpoint's tensors that they were made of."""

    tensors: dict[str, mx.array]
    tensor_names: tuple[str, ...]


class ShardReader:
    """A reader of the embedding, layers and head of a checkpoint.

    Tensor ``name`` is in ``files[name]``. The files must have been checked before. Values are searched for NaN and
    infinity: always those of norms, routers, the embedding and the experts' scales, where a bad value can stay
    unnoticed, since a step may not use it or not show it in its output; with ``check_all`` those of all tensors.
    """

    def __init__(
        self, config: ModelConfig, files: Mapping[str, Path], dtype: mx.Dtype, *, check_all: bool = False
    ) -> None:
        self._config = config
        self._files = files
        self._dtype = dtype
        self._check_all = check_all
        self._headers: dict[Path, Header] = {}

    def embedding(self) -> LoadedTensors:
        """Return ``model.embed_tokens.weight`` (vocabulary, hidden)."""
        return self.read(embedding_specs(self._config))

    def head(self) -> LoadedTensors:
        """Return ``model.norm.weight`` (hidden,) and ``lm_head.weight`` (vocabulary, hidden)."""
        return self.read(head_specs(self._config))

    def layer(self, layer: int) -> LoadedTensors:
        """Return one layer's tensors, named without ``model.layers.N.``; experts are stacked along a new first axis.

        Raises:
            CheckpointError: an expert's ``weight_shape`` does not match the config, a file cannot be read or ends too
                early, or a checked tensor has NaN or infinity.
        """
        specs = layer_specs(self._config, layer)
        prefix = f"{self._config.tensor_prefix}model.layers.{layer}."
        self._check_files(specs)
        loaded = self._load_plain(tuple(spec for spec in specs if not spec.is_routed_expert), prefix)
        if not self._config.is_moe(layer):
            return loaded
        routed = tuple(spec for spec in specs if spec.is_routed_expert)
        self._check_weight_shapes(routed)
        stacked = self._stack_experts(routed, prefix)
        return LoadedTensors(loaded.tensors | stacked, tuple(spec.name for spec in specs))

    def read(self, specs: tuple[TensorSpec, ...]) -> LoadedTensors:
        """Return the tensors of ``specs``, none of which is a routed expert's, named without the config's prefix."""
        self._check_files(specs)
        return self._load_plain(specs, self._config.tensor_prefix)

    def _load_plain(self, specs: tuple[TensorSpec, ...], prefix: str) -> LoadedTensors:
        stored = self._read_each(specs)
        tensors = {
            spec.name.removeprefix(prefix): array.view(mx.bfloat16).astype(self._dtype)
            if spec.dtype == "BF16"
            else array
            for spec, array in zip(specs, stored, strict=True)
        }
        del stored
        mx.eval(tensors)
        self._check_finite(tensors, prefix)
        mx.clear_cache()
        return LoadedTensors(tensors, tuple(spec.name for spec in specs))

    def _check_finite(self, tensors: Mapping[str, mx.array], prefix: str) -> None:
        """Refuse NaN and infinity in the tensors to check. Stacked experts are checked as they are stacked."""
        checked = [
            name
            for name, array in tensors.items()
            if (self._check_all or name.endswith(_ALWAYS_CHECKED)) and mx.issubdtype(array.dtype, mx.floating)
        ]
        totals = {name: mx.sum(tensors[name]) for name in checked}
        mx.eval(totals)
        for name, total in totals.items():
            if not is_finite(total):
                self._refuse(prefix + name)

    def _refuse(self, name: str) -> NoReturn:
        raise CheckpointError(f"{self._files[name]}: {name} has NaN or infinity: fetch the file again")

    def _read_each(self, specs: tuple[TensorSpec, ...]) -> list[mx.array]:
        """Return one array for each tensor, with its bytes as stored."""
        arrays = [mx.zeros(spec.shape, _STORED[spec.dtype]) for spec in specs]
        mx.eval(arrays)
        self._read({spec.name: _bytes_of(array) for spec, array in zip(specs, arrays, strict=True)})
        return arrays

    def _check_weight_shapes(self, specs: tuple[TensorSpec, ...]) -> None:
        rows_and_columns = {
            spec.name.removesuffix(".weight_packed"): [spec.shape[0], spec.shape[1] * 8]
            for spec in specs
            if spec.name.endswith(".weight_packed")
        }
        shapes = {f"{projection}.weight_shape": np.empty(2, np.int64) for projection in rows_and_columns}
        for name in shapes:
            if self._headers[self._files[name]].tensors[name].dtype == "I32":
                shapes[name] = np.empty(2, np.int32)
        self._read({name: shape.data.cast("B") for name, shape in shapes.items()})
        for (name, shape), expected in zip(shapes.items(), rows_and_columns.values(), strict=True):
            actual = shape.tolist()
            if actual != expected:
                raise CheckpointError(
                    f"{self._files[name]}: {name} says {actual}, the config says {expected}: fetch the file again"
                )

    def _stack_experts(self, specs: tuple[TensorSpec, ...], prefix: str) -> dict[str, mx.array]:
        """Read the words, then the scales of one projection of all experts at a time into one array."""
        shapes = {spec.name: spec.shape for spec in specs}
        stacked = {}
        for projection in _PROJECTIONS:
            for kind, dtype in (("weight_packed", mx.uint32), ("weight_scale", mx.uint16)):
                names = [
                    f"{prefix}mlp.experts.{expert}.{projection}.{kind}"
                    for expert in range(self._config.n_routed_experts)
                ]
                whole = mx.zeros((len(names), *shapes[names[0]]), dtype)
                mx.eval(whole)
                buffer = _bytes_of(whole)
                size = len(buffer) // len(names)
                self._read({name: buffer[at * size : (at + 1) * size] for at, name in enumerate(names)})
                if kind == "weight_scale":
                    whole = whole.view(mx.bfloat16)
                    totals = np.array(mx.sum(whole, axis=(1, 2)).astype(mx.float32))
                    if (wrong := np.flatnonzero(~np.isfinite(totals))).size:
                        self._refuse(names[wrong[0]])
                stacked[f"mlp.experts.{projection}.{kind}"] = whole
        mx.eval(stacked)
        return stacked

    def _check_files(self, specs: tuple[TensorSpec, ...]) -> None:
        """Read the headers of the files of ``specs``, and check them again: a file may have been replaced."""
        for path in {self._files[spec.name] for spec in specs}:
            self._headers[path] = check_file(path, [spec for spec in specs if self._files[spec.name] == path])

    def _read(self, targets: Mapping[str, memoryview]) -> None:
        """Read tensors into writable bytes by several threads. Return after the last byte, or raise the first error."""
        with ExitStack() as open_files:
            descriptors: dict[Path, int] = {}
            for path in {self._files[name] for name in targets}:
                descriptors[path] = open_files.enter_context(_open(path)).fileno()
            pool = open_files.enter_context(ThreadPoolExecutor(_READING_THREADS))
            reads = []
            for name, buffer in targets.items():
                path = self._files[name]
                header = self._headers[path]
                start = header.data_start + header.tensors[name].data_offsets[0]
                for first in range(0, len(buffer), _PIECE_BYTES):
                    piece = buffer[first : first + _PIECE_BYTES]
                    reads.append(pool.submit(_read_piece, descriptors[path], piece, start + first, path, name))
            try:
                for read in reads:
                    read.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _open(path: Path) -> BinaryIO:
    try:
        file = open_regular(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if sys.platform == "darwin":
        fcntl.fcntl(file, _F_NOCACHE, 1)
    return file


def _read_piece(descriptor: int, piece: memoryview, offset: int, path: Path, name: str) -> None:
    """Fill ``piece`` from the file. The system may return fewer bytes than requested, so repeat."""
    done = 0
    while done < len(piece):
        try:
            count = os.preadv(descriptor, [piece[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {name}: {error.strerror}") from None
        if count == 0:
            raise CheckpointError(f"{path} is truncated: it ends at byte {offset + done} within {name}; fetch it again")
        done += count


def _bytes_of(array: mx.array) -> memoryview:
    """Return the writable bytes of an evaluated array."""
    return memoryview(array).cast("B")  # type: ignore[arg-type]  # MLX's arrays have the buffer protocol


def is_finite(total: mx.array) -> bool:
    """Return whether a sum is finite. It is NaN or infinite if one of its terms is."""
    value = total.item()
    assert isinstance(value, float), "a sum of floats"
    return math.isfinite(value)
