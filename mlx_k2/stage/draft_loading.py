"""Loading of a stage's part of a draft head: slices of ``fc``, and on the last stage the head itself."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_k2.errors import CheckpointError
from mlx_k2.model.attention import AttentionLimits
from mlx_k2.model.draft_model import DraftModel, DraftWeights
from mlx_k2.model.latent_cache import LatentCache
from mlx_k2.model.layer_weights import assemble_attention, assemble_dense
from mlx_k2.model.linear import Matrix, make_matrix
from mlx_k2.model.stage_model import FeatureSlice, Head
from mlx_k2.weights.draft_head import D2T, EMBEDDING, FC, LM_HEAD, NORM, DraftDescription, kept_rows
from mlx_k2.weights.inventory import head_specs
from mlx_k2.weights.model_source import DraftHead
from mlx_k2.weights.reader import ShardReader


class DraftLoader:
    """A loader of a draft head's tensors. ``target`` reads the tensors that the head shares with its target.

    ``on_loaded`` is called with the new weights each time a part of the head has been loaded.
    """

    def __init__(
        self,
        draft: DraftDescription,
        head: DraftHead,
        target: ShardReader,
        files: Mapping[str, Path],
        dtype: mx.Dtype,
        on_loaded: Callable[[Any], None],
    ) -> None:
        self._draft = draft
        self._head = head
        self._target = target
        self._dtype = dtype
        self._reader = ShardReader(draft.layer, files, dtype, check_all=True)
        self._on_loaded = on_loaded
        self._target_ids = self._read_target_ids()

    def feature_slices(self, layers: range) -> dict[int, FeatureSlice]:
        """Return the slices of ``fc`` for those of ``layers`` whose output the head reads, by index in ``layers``."""
        draft, hidden = self._draft, self._draft.layer.hidden_size
        if not any(layer in layers for layer in draft.aux_layers):
            return {}
        tensors = self._reader.read(draft.aux_specs()).tensors
        bits, eps = self._head.bits, draft.layer.rms_norm_eps
        slices = {}
        for index, layer in enumerate(draft.aux_layers):
            if layer in layers:
                weight = mx.contiguous(tensors[FC][:, index * hidden : (index + 1) * hidden])
                norm = tensors.get(f"fc_norm.{index}.weight")
                slices[layer - layers.start] = FeatureSlice(norm, make_matrix(weight, bits), eps)
        del tensors  # so that the whole ``fc`` is freed when the slices are evaluated
        self._on_loaded(slices)
        return slices

    def model(
        self, embedding: mx.array | None, head: Head, num_slots: int, context_tokens: int, limits: AttentionLimits
    ) -> DraftModel:
        """Return the draft head with a new cache. ``embedding`` (None: not on this stage), ``head``: the target's."""
        layer, norms_output = self._draft.layer, self._draft.norms_output
        cache = LatentCache(1, num_slots, context_tokens, layer.cache_row_dim, self._dtype)
        weights = self._weights(embedding, head)
        return DraftModel(layer, weights, cache, norms_output=norms_output, attention_limits=limits)

    def _weights(self, embedding: mx.array | None, head: Head) -> DraftWeights:
        draft, bits = self._draft, self._head.bits
        tensors = self._reader.read(draft.layer_specs()).tensors
        layer = {name.removeprefix(f"{draft.layer_prefix}."): array for name, array in tensors.items()}
        del tensors
        attention, feed_forward = assemble_attention(draft.layer, layer, bits), assemble_dense(layer, "mlp", bits)
        mx.eval(attention, feed_forward)
        projection, target_ids = self._projection(head)
        weights = DraftWeights(
            embedding=self._embedding(embedding),
            input_norm=layer["input_layernorm.weight"],
            hidden_norm=layer["hidden_norm.weight"],
            attention=attention,
            post_attention_norm=layer["post_attention_layernorm.weight"],
            feed_forward=feed_forward,
            norm=layer[NORM],
            projection=projection,
            target_ids=target_ids,
        )
        del layer
        target_weights = (embedding, head.projection)  # reported when the target was loaded
        self._on_loaded([weight for weight in weights if not any(weight is shared for shared in target_weights)])
        return weights

    def _read_own(self, name: str) -> mx.array:
        """Return a tensor of `DraftDescription.own_specs`, which the head must have."""
        return self._reader.read(tuple(spec for spec in self._draft.own_specs() if spec.name == name)).tensors[name]

    def _embedding(self, target_embedding: mx.array | None) -> mx.array:
        if EMBEDDING in self._draft.index.weight_map:
            return self._read_own(EMBEDDING)
        if target_embedding is not None:
            return target_embedding
        return self._target.embedding().tensors["model.embed_tokens.weight"]

    def _projection(self, head: Head) -> tuple[Matrix, mx.array | None]:
        """Return the matrix to the drafted ids, and these ids; None if they are all of the target's in their order."""
        draft = self._draft
        rows = kept_rows(self._target_ids.tolist(), draft.num_drafted_ids, draft.layer.vocab_size)
        keeps_all, has_own = len(rows) == draft.num_rows, LM_HEAD in draft.index.weight_map
        if keeps_all and not has_own:
            projection = head.projection
        else:
            target_specs = head_specs(draft.layer)[1:]  # without the norm
            weight = self._read_own(LM_HEAD) if has_own else self._target.read(target_specs).tensors[LM_HEAD]
            projection = make_matrix(weight if keeps_all else weight[mx.array(rows)], self._head.bits)
            mx.eval(projection)
        drafted_ids = self._target_ids[rows]
        are_all_ids = np.array_equal(drafted_ids, np.arange(draft.layer.vocab_size))
        return projection, None if are_all_ids else mx.array(drafted_ids.astype(np.int32))

    def _read_target_ids(self) -> NDArray[np.int64]:
        """Return the target's token id of each row of the head's output projection: the row's number plus d2t."""
        row_numbers = np.arange(self._draft.num_rows)
        if D2T not in self._draft.index.weight_map:
            return row_numbers
        target_ids = np.array(self._read_own(D2T)) + row_numbers
        are_outside = (target_ids < 0) | (target_ids >= self._draft.layer.vocab_size)
        if are_outside.any() or len(np.unique(target_ids)) < len(target_ids):
            raise CheckpointError(
                f"--draft-model {self._head.source.path_or_repo}: d2t does not give each row a token of its own among "
                f"the model's {self._draft.layer.vocab_size}"
            )
        return target_ids
