"""Sampling parameters, those that a checkpoint recommends, and sampled tokens. Knows neither logits nor requests."""

import hashlib
from array import array
from collections.abc import Mapping

import msgspec

from mlx_k2.errors import RequestError
from mlx_k2.json_text.parse import JsonError
from mlx_k2.json_text.read import read_json
from mlx_k2.token_mask import id_bytes

REPETITION_WINDOW = 64
"""Number of most recent tokens that the repetition penalty reads."""
MAX_BIASES = 1024
"""Maximum number of tokens with a logit bias in one request."""


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The parameters of one sequence's sampler.

    The repetition penalty applies first. Then the presence penalty is subtracted from the logit of each token that the
    answer contains, the frequency penalty as many times as the answer contains the token, and ``logit_bias`` is added.
    Then the filters apply in the order top-p, min-p, top-k, as in mlx-lm; ``top_k`` None keeps all tokens. Last, the
    logits are divided by the temperature; ``temperature`` 0 selects the most likely token.
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs of a token id and the number that is added to its logit."""
    num_logprobs: int | None = None
    """None: no log-probabilities. N: of the sampled token and of the N most likely tokens."""

    def __post_init__(self) -> None:
        """Reject a value that is out of range.

        Raises:
            RequestError: names the value and its range.
        """
        _check("seed", self.seed, 0 <= self.seed < 2**63, "from 0 to 2^63 - 1")
        _check("temperature", self.temperature, 0 <= self.temperature <= 10, "from 0 (greedy) to 10")
        _check("top-p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        if self.top_k is not None:
            _check("top-k", self.top_k, self.top_k >= 1, "at least 1")
        _check("min-p", self.min_p, 0 <= self.min_p < 1, "at least 0, below 1")
        _check("repetition-penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 10, "above 0, at most 10")
        _check("presence-penalty", self.presence_penalty, -2 <= self.presence_penalty <= 2, "from -2 to 2")
        _check("frequency-penalty", self.frequency_penalty, -2 <= self.frequency_penalty <= 2, "from -2 to 2")
        if self.num_logprobs is not None:
            _check("logprobs", self.num_logprobs, 0 <= self.num_logprobs <= 100, "from 0 to 100")
        self._check_biases()

    def _check_biases(self) -> None:
        num_biases = len(self.logit_bias)
        _check("the number of logit biases", num_biases, num_biases <= MAX_BIASES, f"from 0 to {MAX_BIASES}")
        if len({token_id for token_id, _ in self.logit_bias}) < num_biases:
            raise RequestError("a token has two logit biases: give each token id once")
        for token_id, bias in self.logit_bias:
            _check(f"the logit bias of token {token_id}", bias, -100 <= bias <= 100, "from -100 to 100")


def derived_seed(seed: int, index: int) -> int:
    """Return the seed, 0 to 2^63 - 1, of the answer or the prompt with this index in a run with ``seed``."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sampling_per_answer(sampling: Sampling, num_answers: int) -> list[Sampling]:
    """Return the parameters of each answer: ``sampling`` for the first one, with other seeds for the others."""
    seeds = [derived_seed(sampling.seed, index) for index in range(1, num_answers)]
    return [sampling, *(msgspec.structs.replace(sampling, seed=seed) for seed in seeds)]


def _check(name: str, value: object, is_allowed: bool, allowed_range: str) -> None:
    if not is_allowed:
        raise RequestError(f"{name} {value} is out of range: give a value {allowed_range}")


class LogitBias(msgspec.Struct, frozen=True):
    """Numbers that are added to logits: uint32 token ids and as many float32 values, little-endian."""

    token_ids: bytes
    values: bytes

    @classmethod
    def of(cls, biases: Mapping[int, float]) -> "LogitBias":
        """Encode biases by token id."""
        return cls(id_bytes(biases), array("f", biases.values()).tobytes())

    def by_token(self) -> dict[int, float]:
        """Decode the biases by token id."""
        token_ids, values = memoryview(self.token_ids).cast("I"), memoryview(self.values).cast("f")
        return dict(zip(token_ids, values, strict=True))


class SampledToken(msgspec.Struct, frozen=True):
    """A token sampled for one row. ``top`` holds (token id, log-probability) of the most likely tokens.

    Without a request for log-probabilities ``logprob`` is None and ``top`` is empty.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class GenerationConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Values that a checkpoint's generation_config.json recommends. A value that the file does not have is None."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The stop tokens as a tuple."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    @classmethod
    def from_json(cls, data: bytes) -> "GenerationConfig":
        """Parse the bytes of generation_config.json.

        Raises:
            RequestError: ``data`` is not a JSON object, or a value has the wrong type.
        """
        try:
            config = read_json(data, cls)
        except JsonError as error:
            raise RequestError(f"generation_config.json cannot be read: {error}") from None
        return msgspec.structs.replace(config, top_k=None) if config.top_k == 0 else config  # 0 in the file: all tokens
