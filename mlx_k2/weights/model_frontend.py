"""The parts of a checkpoint that convert between text and tokens. Knows no tensors."""

from dataclasses import dataclass
from functools import cached_property

from mlx_k2.sampling import GenerationConfig
from mlx_k2.text.chat_template import ChatTemplate, load_chat_template
from mlx_k2.text.grammar import GrammarCompiler
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer
from mlx_k2.weights.checkpoint import ModelDescription


@dataclass(frozen=True)
class ModelFrontend:
    """A model's tokenizer, chat template and recommended sampling, each parsed once on first use.

    ``context_tokens`` is the largest number of tokens of a sequence that the stages can cache. The first use of a
    property raises TokenizerError or RequestError if its file has errors.
    """

    model: ModelDescription
    context_tokens: int

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. To load one of Kimi K2's size takes noticeable time."""
        return load_tokenizer(self.model.files, self.model.config.vocab_size)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, which renders messages to a prompt."""
        return load_chat_template(self.model.files)

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """The compiler of grammars to token masks over the model's vocabulary."""
        return GrammarCompiler(self.tokenizer)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids of the tokens that end an answer."""
        return self.tokenizer.stop_ids | {*self.model.config.eos_token_ids, *self.recommended.eos_token_ids}

    @cached_property
    def recommended(self) -> GenerationConfig:
        """The sampling settings that the checkpoint recommends."""
        return GenerationConfig.from_json(self.model.files.get("generation_config.json", b"{}"))
