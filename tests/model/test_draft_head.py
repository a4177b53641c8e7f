"""Tests of a draft head: it computes what a PyTorch oracle does, and its features are the same bits for any stages."""

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
from tests.model.chain import Chain, likeliest, split_layers
from tests.model.checkpoints import VARIANTS, Checkpoint, read_config
from tests.model.draft_heads import LoadedDraft, head_at
from tests.oracles.draft_heads import HEADS, write_heads

GOLDENS = Path(__file__).parent.parent / "oracles" / "eagle3"
Golden = Mapping[str, NDArray[np.float32]]
"""The oracle's inputs and results, by name."""


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heads")
    write_heads(folder)
    return folder


@pytest.fixture(scope="module", params=HEADS)
def golden(request: pytest.FixtureRequest, heads: Path) -> tuple[Golden, LoadedDraft]:
    """Return the oracle's results for a head, and the head. The golden file has the digest of the head's weights."""
    name: str = request.param
    data = (heads / name / "model.safetensors").read_bytes()
    arrays: Golden = np.load(GOLDENS / f"{name}.npz")
    assert hashlib.sha256(data).digest() == arrays["digest"].tobytes(), "the oracle computed another head"
    return arrays, LoadedDraft(head_at(heads / name), heads / "target")


def features_of(loaded: LoadedDraft, states: NDArray[np.float32]) -> mx.array:
    """Return fc's product with ``states``, the outputs (layers, tokens, hidden) of the layers that the head reads."""
    slices = loaded.slices(range(loaded.config.num_hidden_layers))
    total = mx.zeros(states.shape[1:])
    for layer, output in zip(loaded.draft.aux_layers, mx.array(states), strict=True):
        total = total + slices[layer].product(output)
    return total


def assert_close(actual: mx.array, expected: NDArray[np.float32]) -> None:
    """Assert that no difference is above 1e-5 of the largest finite value."""
    largest = np.abs(expected[np.isfinite(expected)]).max()
    np.testing.assert_allclose(np.array(actual), expected, rtol=0, atol=1e-5 * largest)


def run_head(model: DraftModel, tokens: list[int], features: mx.array, num_drafts: int) -> tuple[mx.array, mx.array]:
    """Return the head's logits and output features for each token, and for ``num_drafts`` greedy drafts after them.

    The tokens are at the positions from 1 on, and ``features`` are those of the positions before them, from 0 on.
    """
    logits, outputs = [], []
    for index, token in enumerate(tokens):
        output = model.run(token, features[index : index + 1], slot=0, position=index + 1)
        logits.append(model.logits(output))
        outputs.append(output.features)
    for index in range(num_drafts):
        output = model.run(likeliest(logits[-1]), outputs[-1], slot=0, position=len(tokens) + index + 1)
        logits.append(model.logits(output))
        outputs.append(output.features)
    return mx.concatenate(logits), mx.concatenate(outputs)


def test_a_head_computes_what_the_oracle_does(golden: tuple[Golden, LoadedDraft]) -> None:
    expected, loaded = golden
    features = features_of(loaded, expected["states"])
    assert_close(features, expected["features"])
    tokens = expected["tokens"][1:].tolist()  # the head does not run at position 0, which has no features before it
    logits, outputs = run_head(loaded.model(), tokens, features, len(expected["logits"]) - len(tokens))
    assert_close(outputs, expected["outputs"])
    assert_close(logits, expected["logits"])


def test_write_rows_writes_the_same_rows_as_run(golden: tuple[Golden, LoadedDraft]) -> None:
    expected, loaded = golden
    features = features_of(loaded, expected["states"])
    tokens = expected["tokens"][1:].tolist()
    running, writing = loaded.model(), loaded.model()
    run_head(running, tokens, features, num_drafts=0)
    for start, end in ((0, 4), (4, len(tokens))):  # in two chunks
        span = Span(0, start + 1, end - start, is_prompt=True)
        writing.write_rows(mx.array(tokens[start:end]), features[start:end], Batch([span]))
    all_tokens = Span(0, 1, len(tokens), is_prompt=True)
    assert mx.array_equal(writing.cache.rows(0, all_tokens), running.cache.rows(0, all_tokens))


def test_a_head_limited_to_40_ids_keeps_the_logits_of_the_smallest_ids_and_of_control_tokens(heads: Path) -> None:
    num_drafted_ids, num_control = 40, 5  # an eighth

    def logits_with(name: str, vocab_size: int | None) -> NDArray[np.float32]:
        loaded = LoadedDraft(head_at(heads / name, vocab_size=vocab_size), heads / "target")
        model = loaded.model()
        output = model.run(5, mx.ones((1, loaded.config.hidden_size)), slot=0, position=1)
        logits: NDArray[np.float32] = np.array(model.logits(output)[0])
        return logits

    for name in ("own", "shared", "midlayer-32k"):
        all_logits, limited_logits = logits_with(name, None), logits_with(name, num_drafted_ids)
        kept = np.isfinite(limited_logits)
        assert kept.sum() == num_drafted_ids
        np.testing.assert_allclose(limited_logits[kept], all_logits[kept], rtol=1e-5, atol=1e-5)
        drafted_ids = np.flatnonzero(np.isfinite(all_logits))
        smallest_ids = drafted_ids[: num_drafted_ids - num_control]
        assert kept[smallest_ids].all()
        assert kept[drafted_ids[drafted_ids >= len(kept) - num_control]].all()


@pytest.mark.parametrize("fc_norms", [False, True])
def test_features_and_outputs_are_the_same_bits_for_any_stages(
    checkpoint: Checkpoint, tmp_path: Path, fc_norms: bool
) -> None:
    target = checkpoint("thinking")
    fields = draft_config_fields(VARIANTS["thinking"])
    write_random_draft_head(
        tmp_path / "head", fields, read_config(target), seed=1, own_tensors=(LM_HEAD,), fc_norms=fc_norms
    )
    tokens = [(37 * at) % 500 for at in range(40)]
    batch = Batch([Span(0, 0, len(tokens), is_prompt=True)])
    results = []
    for num_stages in (1, 2, 3, 7):
        chain = Chain(target, num_stages)
        loaded = LoadedDraft(head_at(tmp_path / "head"), target)
        hidden = chain.stages[0].embed(mx.array(tokens))
        features = mx.zeros_like(hidden)
        for layers, stage in zip(split_layers(chain.config.num_hidden_layers, num_stages), chain.stages, strict=True):
            stage.feature_slices = loaded.slices(layers)
            hidden, new_features = stage.run(hidden, batch, features)
            assert new_features is not None
            features = new_features
        mx.eval(hidden, features)
        results.append((hidden, features))
    first_hidden, first_features = results[0]
    for hidden, features in results[1:]:
        assert mx.array_equal(hidden, first_hidden)
        assert mx.array_equal(features, first_features)
    assert_close(first_features, features_by_one_product(target, tmp_path / "head", tokens))


def features_by_one_product(target: Path, head: Path, tokens: list[int]) -> NDArray[np.float32]:
    """Return the product of fc, as one matrix, with the joined outputs of the layers that the head reads."""
    loaded = LoadedDraft(head_at(head), target)
    chain = Chain(target, loaded.config.num_hidden_layers)  # one layer per stage, so that each output is seen
    batch = Batch([Span(0, 0, len(tokens), is_prompt=True)])
    hidden = chain.stages[0].embed(mx.array(tokens))
    inputs = []
    for layer, stage in enumerate(chain.stages):
        hidden, _ = stage.run(hidden, batch)
        if layer in loaded.draft.aux_layers:
            norm = loaded.slices(range(layer, layer + 1))[0].norm
            inputs.append(hidden if norm is None else mx.fast.rms_norm(hidden, norm, chain.config.rms_norm_eps))
    tensors = mx.load(str(head / "model.safetensors"))
    assert isinstance(tensors, dict)
    return np.array(mx.concatenate(inputs, axis=-1) @ tensors["fc.weight"].astype(mx.float32).T)
