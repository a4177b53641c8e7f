"""Tests of a draft head's forward pass against the PyTorch oracle, and of its features over any stages."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_k2.model.batch import Batch, Span
from mlx_k2.model.draft_model import DraftModel
from mlx_k2.testing.random_draft_head import draft_config_fields, write_random_draft_head
from mlx_k2.weights.draft_head import LM_HEAD
from tests.model.chain import Chain, split_layers
from tests.model.checkpoints import VARIANTS, Checkpoint, read_config
from tests.model.draft_heads import LoadedDraft, head_at
from tests.oracles.draft_heads import HEADS, write_heads

GOLDENS = Path(__file__).parent.parent / "oracles" / "eagle3"
Golden = Mapping[str, NDArray[np.float32]]


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    write_heads(folder)
    return folder


@pytest.fixture(scope="module", params=HEADS)
def golden(request: pytest.FixtureRequest, heads: Path) -> tuple[Golden, LoadedDraft]:
    """Return a head's results of the oracle, which read the same file, and the head."""
    name: str = request.param
    data = (heads / name / "model.safetensors").read_bytes()
    found: Golden = np.load(GOLDENS / f"{name}.npz")
    assert hashlib.sha256(data).digest() == found["digest"].tobytes(), "the oracle computed another head"
    return found, LoadedDraft(head_at(heads / name), heads / "target")


def features_of(loaded: LoadedDraft, states: NDArray[np.float32]) -> mx.array:
    """Return fc's product with the outputs of all layers that the head reads, (layers, tokens, hidden)."""
    slices = loaded.slices(range(loaded.config.num_hidden_layers))
    total = mx.zeros(states.shape[1:])
    for layer, output in zip(loaded.draft.aux_layers, mx.array(states), strict=True):
        total = total + slices[layer].product(output)
    return total


def assert_close(found: mx.array, expected: NDArray[np.float32]) -> None:
    """Compare with an error of 1e-5 of the largest finite value."""
    largest = np.abs(expected[np.isfinite(expected)]).max()
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=1e-5 * largest)


def run(model: DraftModel, tokens: list[int], features: mx.array, num_hops: int) -> tuple[mx.array, mx.array]:
    """Return logits and outputs of each token and of ``num_hops`` more, whose tokens are the likeliest ones."""
    logits, outputs = [], []
    for at, token in enumerate(tokens):
        output = model.run(token, features[at : at + 1], 0, at + 1)
        logits.append(model.logits(output))
        outputs.append(output.features)
    for hop in range(num_hops):
        output = model.run(np.asarray(mx.argmax(logits[-1])).item(), outputs[-1], 0, len(tokens) + hop + 1)
        logits.append(model.logits(output))
        outputs.append(output.features)
    return mx.concatenate(logits), mx.concatenate(outputs)


def test_a_head_computes_what_the_oracle_does(golden: tuple[Golden, LoadedDraft]) -> None:
    expected, loaded = golden
    features = features_of(loaded, expected["states"])
    assert_close(features, expected["features"])
    tokens = expected["tokens"][1:].tolist()
    logits, outputs = run(loaded.model(), tokens, features, len(expected["logits"]) - len(tokens))
    assert_close(outputs, expected["outputs"])
    assert_close(logits, expected["logits"])


def test_rows_that_are_only_written_equal_those_of_the_whole_head(golden: tuple[Golden, LoadedDraft]) -> None:
    expected, loaded = golden
    features = features_of(loaded, expected["states"])
    tokens = expected["tokens"][1:].tolist()
    whole, rows = loaded.model(), loaded.model()
    run(whole, tokens, features, 0)
    for start in (0, 4):  # in two chunks
        chunk = tokens[start : start + 4] if start == 0 else tokens[start:]
        span = Span(0, start + 1, len(chunk), is_prompt=True)
        rows.write_rows(mx.array(chunk), features[start : start + len(chunk)], Batch([span]))
    every = Span(0, 1, len(tokens), is_prompt=True)
    assert mx.array_equal(rows.cache.rows(0, every), whole.cache.rows(0, every))


def test_rows_of_the_most_frequent_tokens_keep_their_logits(heads: Path) -> None:
    for name in ("own", "shared", "midlayer-32k"):
        loaded = [LoadedDraft(head_at(heads / name, vocab_size=size), heads / "target") for size in (None, 40)]
        feature = mx.ones((1, loaded[0].config.hidden_size))
        logits = []
        for one in loaded:
            model = one.model()
            logits.append(np.array(model.logits(model.run(5, feature, 0, 1))))
        kept = np.isfinite(logits[1])
        assert kept.sum() == 40
        np.testing.assert_allclose(logits[1][kept], logits[0][kept], rtol=1e-5, atol=1e-5)
        drafted = np.flatnonzero(np.isfinite(logits[0]))
        assert np.isin(drafted[:35], np.flatnonzero(kept)).all()


@pytest.mark.parametrize("fc_norms", [False, True])
def test_features_and_outputs_are_the_same_bits_for_any_stages(
    checkpoint: Checkpoint, tmp_path: Path, fc_norms: bool
) -> None:
    target = checkpoint("thinking")
    fields = draft_config_fields(VARIANTS["thinking"])
    write_random_draft_head(
        tmp_path / "head", fields, read_config(target), 1, own_tensors=(LM_HEAD,), fc_norms=fc_norms
    )
    tokens = [(37 * at) % 500 for at in range(40)]
    batch = Batch([Span(0, 0, len(tokens), is_prompt=True)])
    found = []
    for num_stages in (1, 2, 3, 7):
        chain = Chain(target, num_stages)
        loaded = LoadedDraft(head_at(tmp_path / "head"), target)
        hidden = chain.stages[0].embed(mx.array(tokens))
        features = mx.zeros_like(hidden)
        for layers, stage in zip(split_layers(chain.config.num_hidden_layers, num_stages), chain.stages, strict=True):
            stage.feature_slices = loaded.slices(layers)
            hidden, added = stage.run(hidden, batch, features)
            assert added is not None
            features = added
        mx.eval(hidden, features)
        found.append((hidden, features))
    for hidden, features in found[1:]:
        assert mx.array_equal(hidden, found[0][0])
        assert mx.array_equal(features, found[0][1])
    assert_close(found[0][1], one_matrix(target, tmp_path / "head", tokens))


def one_matrix(target: Path, head: Path, tokens: list[int]) -> NDArray[np.float32]:
    """Return fc as one matrix times the joined outputs of layers 1, 2 and 3, each from a chain that ends there."""
    loaded = LoadedDraft(head_at(head), target)
    chain = Chain(target, 7)
    batch = Batch([Span(0, 0, len(tokens), is_prompt=True)])
    hidden = chain.stages[0].embed(mx.array(tokens))
    read = []
    for layer, stage in enumerate(chain.stages):
        hidden, _ = stage.run(hidden, batch)
        if layer in loaded.draft.aux_layers:
            norm = next(iter(loaded.slices(range(layer, layer + 1)).values())).norm
            read.append(hidden if norm is None else mx.fast.rms_norm(hidden, norm, chain.config.rms_norm_eps))
    tensors = mx.load(str(head / "model.safetensors"))
    assert isinstance(tensors, dict)
    return np.array(mx.concatenate(read, axis=-1) @ tensors["fc.weight"].astype(mx.float32).T)
