"""The reader of one stage's tensors from the checkpoint's safetensors files into mlx arrays, one layer at a time.

Nothing is converted on disk. Routed experts stay as shipped, stacked: packed INT4 words and bfloat16 scales, 4.5 bits
per weight. All other tensors are cast to the compute dtype, except the router's correction bias, which stays float32.
At most the size of one layer is used beyond the tensors that stay in memory.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn, cast

import mlx.core as mx
import numpy as np

from mlx_k2.config import ModelConfig
from mlx_k2.errors import CheckpointError
from mlx_k2.weights.inventory import TensorSpec, embedding_specs, head_specs, layer_specs

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class LoadedTensors(NamedTuple):
    """Evaluated tensors by short name, and the names of the checkpoint's tensors that they were made of."""

    tensors: dict[str, mx.array]
    tensor_names: tuple[str, ...]

    @property
    def held_bytes(self) -> int:
        """Bytes that the tensors take in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class ShardReader:
    """A reader of the embedding, layers and head of a checkpoint.

    Tensor ``name`` is in ``files[name]``. The files must have been checked before. Values are searched for NaN and
    infinity: always those of norms, routers, the embedding and the experts' scales, because not every step uses them,
    or a step can use them without NaN in its output; with ``check_all`` those of all tensors.
    """

    def __init__(
        self, config: ModelConfig, files: Mapping[str, Path], dtype: mx.Dtype, *, check_all: bool = False
    ) -> None:
        self._config = config
        self._files = files
        self._dtype = dtype
        self._check_all = check_all

    def embedding(self) -> LoadedTensors:
        """Return ``model.embed_tokens.weight`` (vocabulary, hidden)."""
        return self._plain(embedding_specs(self._config))

    def head(self) -> LoadedTensors:
        """Return ``model.norm.weight`` (hidden,) and ``lm_head.weight`` (vocabulary, hidden)."""
        return self._plain(head_specs(self._config))

    def layer(self, layer: int) -> LoadedTensors:
        """Return one layer's tensors, named without ``model.layers.N.``; experts are stacked along a new first axis.

        Raises:
            CheckpointError: an expert's ``weight_shape`` does not match the config, or a checked tensor has NaN or
                infinity.
        """
        specs = layer_specs(self._config, layer)
        prefix = f"{self._config.tensor_prefix}model.layers.{layer}."
        lazy = self._open(specs)
        tensors = {spec.name.removeprefix(prefix): self._cast(lazy, spec) for spec in specs if _is_plain(spec)}
        if self._config.is_moe(layer):
            self._check_weight_shapes(lazy, specs)
            tensors |= self._stack_experts(lazy, prefix)
        mx.eval(tensors)
        self._check_finite(tensors, prefix)
        mx.clear_cache()
        return LoadedTensors(tensors, tuple(spec.name for spec in specs))

    def _plain(self, specs: tuple[TensorSpec, ...]) -> LoadedTensors:
        lazy = self._open(specs)
        tensors = {spec.name.removeprefix(self._config.tensor_prefix): self._cast(lazy, spec) for spec in specs}
        mx.eval(tensors)
        self._check_finite(tensors, self._config.tensor_prefix)
        mx.clear_cache()
        return LoadedTensors(tensors, tuple(spec.name for spec in specs))

    def _check_finite(self, tensors: Mapping[str, mx.array], prefix: str) -> None:
        """Refuse NaN and infinity in the tensors to check, except in stacked experts, which are checked as stacked."""
        plain = {name: tensor for name, tensor in tensors.items() if not name.startswith("mlp.experts.")}
        totals = {name: mx.sum(tensor) for name, tensor in plain.items() if self._check_all or _always_checked(name)}
        mx.eval(totals)
        for name, total in totals.items():
            if not is_finite(total):
                self._refuse(prefix + name)

    def _refuse(self, name: str) -> NoReturn:
        raise CheckpointError(f"{self._files[name]}: {name} has NaN or infinity: fetch the file again")

    def _open(self, specs: tuple[TensorSpec, ...]) -> dict[str, mx.array]:
        """Return the tensors of ``specs``, not yet read: mx.load reads a tensor when it is first evaluated."""
        opened: dict[str, mx.array] = {}
        for path in sorted({self._files[spec.name] for spec in specs}):
            opened |= cast("dict[str, mx.array]", mx.load(str(path)))
        return {spec.name: opened[spec.name] for spec in specs}

    def _cast(self, lazy: dict[str, mx.array], spec: TensorSpec) -> mx.array:
        tensor = lazy.pop(spec.name)
        return tensor if spec.dtype == "F32" else tensor.astype(self._dtype)

    def _check_weight_shapes(self, lazy: dict[str, mx.array], specs: tuple[TensorSpec, ...]) -> None:
        rows_and_columns = {
            spec.name.removesuffix(".weight_packed"): [spec.shape[0], spec.shape[1] * 8]
            for spec in specs
            if spec.name.endswith(".weight_packed")
        }
        names = [f"{projection}.weight_shape" for projection in rows_and_columns]
        found = np.asarray(mx.stack([lazy.pop(name) for name in names])).tolist()
        for name, expected, actual in zip(names, rows_and_columns.values(), found, strict=True):
            if actual != expected:
                raise CheckpointError(
                    f"{self._files[name]}: {name} says {actual}, the config says {expected}: fetch the file again"
                )

    def _stack_experts(self, lazy: dict[str, mx.array], prefix: str) -> dict[str, mx.array]:
        """Stack one part of one projection at a time, and release its tensors before the next."""
        stacked = {}
        for projection in _PROJECTIONS:
            for part in ("weight_packed", "weight_scale"):
                names = [
                    f"{prefix}mlp.experts.{expert}.{projection}.{part}"
                    for expert in range(self._config.n_routed_experts)
                ]
                whole = mx.stack([lazy.pop(name) for name in names])
                whole = whole.view(mx.uint32) if part == "weight_packed" else whole
                totals = mx.sum(whole, axis=(1, 2)) if part == "weight_scale" else mx.zeros(1)
                mx.eval(whole, totals)
                if (wrong := np.flatnonzero(~np.isfinite(np.asarray(totals.astype(mx.float32))))).size:
                    self._refuse(names[wrong[0]])
                mx.clear_cache()
                stacked[f"mlp.experts.{projection}.{part}"] = whole
        return stacked


def is_finite(total: mx.array) -> bool:
    """Return whether a sum is finite. It is NaN or infinite if one of its terms is."""
    value = total.item()
    assert isinstance(value, float), "a sum of floats"
    return math.isfinite(value)


def _always_checked(name: str) -> bool:
    return name.endswith(("norm.weight", "mlp.gate.weight", "e_score_correction_bias", "embed_tokens.weight"))


def _is_plain(spec: TensorSpec) -> bool:
    return not spec.is_routed_expert
