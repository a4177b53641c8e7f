"""Draft heads, loaded as a stage loads them."""

from pathlib import Path

import mlx.core as mx

from mlx_k2.model.attention import ON_CPU
from mlx_k2.model.draft_model import DraftModel
from mlx_k2.model.stage_model import FeatureSlice, Head, StageModel
from mlx_k2.stage.draft_loading import DraftLoader
from mlx_k2.weights.checkpoint import locate_tensors
from mlx_k2.weights.draft_head import DraftDescription
from mlx_k2.weights.model_files import read_draft
from mlx_k2.weights.model_source import DraftHead, ModelSource
from tests.model.chain import open_shards
from tests.model.checkpoints import read_config


def head_at(folder: Path, aux_layers: tuple[int, ...] | None = None, vocab_size: int | None = None) -> DraftHead:
    """Return the loading options of the head in ``folder``, without quantization."""
    source = ModelSource(path_or_repo=str(folder))
    return DraftHead(source=source, aux_layers=aux_layers, vocab_size=vocab_size)


class LoadedDraft:
    """A draft head in float32, for the target whose checkpoint is in ``target``."""

    def __init__(self, head: DraftHead, target: Path) -> None:
        self.config = read_config(target)
        self.draft: DraftDescription = read_draft(head, self.config).draft
        self._shards = open_shards(target, self.config)
        files = locate_tensors(Path(head.source.path_or_repo), self.draft.index, self.draft.specs())
        self.loaded: list[object] = []  # the weights that the loader reported, in the order of loading
        self._loader = DraftLoader(self.draft, head, self._shards, files, mx.float32, self.loaded.append)

    def slices(self, layers: range) -> dict[int, FeatureSlice]:
        """Return the slices of ``fc`` for the ``layers`` whose outputs the head reads."""
        return self._loader.feature_slices(layers)

    def model(self, last: StageModel | None = None, num_slots: int = 4, context_tokens: int = 1024) -> DraftModel:
        """Return the head with an empty cache. It shares weights with ``last``, the target's last stage, if given."""
        if last is not None and last.head is not None:
            return self._loader.model(last.embedding, last.head, num_slots, context_tokens, ON_CPU)
        tensors = self._shards.head().tensors
        head = Head(tensors["model.norm.weight"], mx.contiguous(tensors["lm_head.weight"].T))
        return self._loader.model(None, head, num_slots, context_tokens, ON_CPU)
