"""The reader of one stage's tensors from the checkpoint's safetensors files into mlx arrays, one layer at a time.

Routed experts of a layer are stacked and stay as stored: packed INT4 words and bfloat16 scales, 4.5 bits per weight.
All other bfloat16 tensors are cast to the compute dtype; the router's correction bias stays float32. Beyond the tensors
that stay in memory, reading needs at most the memory of one layer.

Tensors are read in three steps: their arrays are allocated and evaluated, several threads read the bytes straight into
the arrays, and then values are computed from them. So no GPU work waits for a disk: macOS ends GPU work that waits for
seconds (docs/design/0102).
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
from mlx_k2.weights.inventory import INT4_PER_WORD, TensorSpec, embedding_specs, head_specs, layer_specs
from mlx_k2.weights.safetensors_file import Header, open_regular

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_ALWAYS_CHECKED = ("norm.weight", "mlp.gate.weight", "e_score_correction_bias", "embed_tokens.weight")
"""Ends of the names of tensors that are always searched for NaN and infinity (`ShardReader`)."""
_NUM_THREADS = 8
_PIECE_BYTES = 32 * 2**20  # what one thread reads at a time
_F_NOCACHE = 48
"""Command of macOS's fcntl: do not keep the file's pages in memory. 300 GB of pages would displace the weights."""
_ARRAY_DTYPES = {"BF16": mx.uint16, "F32": mx.float32, "I64": mx.int64}
"""The dtype of the array that a tensor's bytes are read into: Python's buffers have no bfloat16."""


class LoadedTensors(NamedTuple):
    """Evaluated tensors by short name, and the names of the checkpoint's tensors that they were made of."""

    tensors: dict[str, mx.array]
    tensor_names: tuple[str, ...]


class ShardReader:
    """A reader of embedding, layers and head of a checkpoint. ``files`` has the path of each tensor's file, by name.

    Norms, routers, the embedding and the experts' scales are always searched for NaN and infinity: a bad value in them
    can go unnoticed, because a step does not read it, or its output does not show it. With ``check_all`` all
    floating-point tensors are searched.
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
        """Return one layer's tensors, named without ``model.layers.N.``. Experts are stacked along a new first axis.

        Raises:
            CheckpointError: an expert's ``weight_shape`` does not match the config, a file cannot be read or ends too
                early, or a checked tensor has NaN or infinity.
        """
        specs = layer_specs(self._config, layer)
        prefix = f"{self._config.tensor_prefix}model.layers.{layer}."
        self._check_headers(specs)
        loaded = self._load_unstacked(tuple(spec for spec in specs if not spec.is_routed_expert), prefix)
        if not self._config.is_moe(layer):
            return loaded
        expert_specs = tuple(spec for spec in specs if spec.is_routed_expert)
        self._check_weight_shapes(expert_specs)
        stacked = self._stack_experts(expert_specs, prefix)
        return LoadedTensors(loaded.tensors | stacked, tuple(spec.name for spec in specs))

    def read(self, specs: tuple[TensorSpec, ...]) -> LoadedTensors:
        """Return the tensors of ``specs``, none of them a routed expert's, named without the config's tensor prefix."""
        self._check_headers(specs)
        return self._load_unstacked(specs, self._config.tensor_prefix)

    def _load_unstacked(self, specs: tuple[TensorSpec, ...], prefix: str) -> LoadedTensors:
        arrays = self._read_arrays(specs)
        tensors = {}
        for spec in specs:
            array = arrays.pop(spec.name)
            tensors[spec.name.removeprefix(prefix)] = (
                array.view(mx.bfloat16).astype(self._dtype) if spec.dtype == "BF16" else array
            )
        del array  # the last stored array: each one can be freed when its cast is evaluated
        mx.eval(tensors)
        self._check_finite({spec.name: tensors[spec.name.removeprefix(prefix)] for spec in specs})
        mx.clear_cache()
        return LoadedTensors(tensors, tuple(spec.name for spec in specs))

    def _check_finite(self, tensors: Mapping[str, mx.array]) -> None:
        """Refuse NaN and infinity in the tensors to check, by full name. `_stack_experts` checks experts' scales."""
        totals = {
            name: mx.sum(array)
            for name, array in tensors.items()
            if (self._check_all or name.endswith(_ALWAYS_CHECKED)) and mx.issubdtype(array.dtype, mx.floating)
        }
        mx.eval(totals)
        for name, total in totals.items():
            if not is_finite(total):
                self._raise_not_finite(name)

    def _raise_not_finite(self, name: str) -> NoReturn:
        raise CheckpointError(f"{self._files[name]}: {name} has NaN or infinity: fetch the file again")

    def _read_arrays(self, specs: tuple[TensorSpec, ...]) -> dict[str, mx.array]:
        """Return an array with the stored bytes of each tensor, by name."""
        arrays = {spec.name: mx.zeros(spec.shape, _ARRAY_DTYPES[spec.dtype]) for spec in specs}
        mx.eval(arrays)
        self._read({name: _bytes_of(array) for name, array in arrays.items()})
        return arrays

    def _check_weight_shapes(self, specs: tuple[TensorSpec, ...]) -> None:
        """Compare each expert's ``weight_shape`` (rows, columns) in the file with the shape of its packed words."""
        expected = {
            f"{spec.name.removesuffix('_packed')}_shape": [spec.shape[0], spec.shape[1] * INT4_PER_WORD]
            for spec in specs
            if spec.name.endswith(".weight_packed")
        }
        shapes = {}
        for name in expected:
            dtype = self._headers[self._files[name]].tensors[name].dtype
            shapes[name] = np.empty(2, np.int32 if dtype == "I32" else np.int64)
        self._read({name: shape.data.cast("B") for name, shape in shapes.items()})
        for name, shape in shapes.items():
            actual = shape.tolist()
            if actual != expected[name]:
                raise CheckpointError(
                    f"{self._files[name]}: {name} says {actual}, the config says {expected[name]}: fetch the file again"
                )

    def _stack_experts(self, specs: tuple[TensorSpec, ...], prefix: str) -> dict[str, mx.array]:
        """Return the words and the scales of each projection, each in one array of all experts. Check the scales."""
        shapes = {spec.name: spec.shape for spec in specs}
        stacked = {}
        for projection in _PROJECTIONS:
            for kind, dtype in (("weight_packed", mx.uint32), ("weight_scale", mx.uint16)):
                names = [
                    f"{prefix}mlp.experts.{expert}.{projection}.{kind}"
                    for expert in range(self._config.n_routed_experts)
                ]
                stack = mx.zeros((len(names), *shapes[names[0]]), dtype)
                mx.eval(stack)
                buffer = _bytes_of(stack)
                size = len(buffer) // len(names)
                self._read({name: buffer[index * size : (index + 1) * size] for index, name in enumerate(names)})
                if kind == "weight_scale":
                    stack = stack.view(mx.bfloat16)
                    totals = np.array(mx.sum(stack, axis=(1, 2)).astype(mx.float32))
                    not_finite = np.flatnonzero(~np.isfinite(totals))
                    if not_finite.size:
                        self._raise_not_finite(names[not_finite[0]])
                stacked[f"mlp.experts.{projection}.{kind}"] = stack
        mx.eval(stacked)
        return stacked

    def _check_headers(self, specs: tuple[TensorSpec, ...]) -> None:
        """Read and check the headers of the files of ``specs``, just before their tensors are read."""
        for path in {self._files[spec.name] for spec in specs}:
            self._headers[path] = check_file(path, [spec for spec in specs if self._files[spec.name] == path])

    def _read(self, targets: Mapping[str, memoryview]) -> None:
        """Read tensors, by name, into writable buffers by several threads. Return when all are read.

        Raises:
            CheckpointError: a file cannot be read or ends too early.
        """
        with ExitStack() as open_files:
            descriptors: dict[Path, int] = {}
            for path in {self._files[name] for name in targets}:
                descriptors[path] = open_files.enter_context(_open(path)).fileno()
            pool = open_files.enter_context(ThreadPoolExecutor(_NUM_THREADS))
            pending_reads = []
            for name, buffer in targets.items():
                path = self._files[name]
                header = self._headers[path]
                start = header.data_start + header.tensors[name].data_offsets[0]
                for first in range(0, len(buffer), _PIECE_BYTES):
                    piece = buffer[first : first + _PIECE_BYTES]
                    pending_reads.append(pool.submit(_read_piece, descriptors[path], piece, start + first, path, name))
            try:
                for pending_read in pending_reads:
                    pending_read.result()
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
    """Fill ``piece`` from byte ``offset`` of the file. The system may return fewer bytes than requested, so repeat."""
    done_bytes = 0
    while done_bytes < len(piece):
        end = offset + done_bytes
        try:
            num_bytes = os.preadv(descriptor, [piece[done_bytes:]], end)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {name}: {error.strerror}") from None
        if num_bytes == 0:
            raise CheckpointError(f"{path} is truncated: it ends at byte {end} within {name}; fetch it again")
        done_bytes += num_bytes


def _bytes_of(array: mx.array) -> memoryview:
    """Return the writable bytes of an evaluated array."""
    return memoryview(array).cast("B")  # type: ignore[arg-type]  # MLX's arrays have the buffer protocol


def is_finite(total: mx.array) -> bool:
    """Return whether a sum is finite. A sum is NaN or infinite if one of its terms is."""
    value = total.item()
    assert isinstance(value, float), f"the sum is {total.dtype}, not floating-point"
    return math.isfinite(value)
