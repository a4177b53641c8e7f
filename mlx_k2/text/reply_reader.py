"""Drawn tokens to the parts of a reply, as they come. Knows neither messages nor where the tokens come from."""

from collections.abc import Collection, Iterator, Sequence

from mlx_k2.text.detokenizer import Detokenizer
from mlx_k2.text.prompt import opens_reasoning
from mlx_k2.text.reply_parser import Part, ReplyParser
from mlx_k2.text.tokenizer import Tokenizer


class ReplyReader:
    """Reads the reply to one prompt; a token of ``stop_ids`` ends it and says nothing."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._detokenizer = Detokenizer(tokenizer)
        self._parser = ReplyParser(tokenizer.special_ids, in_reasoning=opens_reasoning(tokenizer, prompt_ids))

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is thought, as far as can be told."""
        return self._parser.in_reasoning

    def add(self, token_id: int) -> tuple[Part, ...]:
        """The parts that ``token_id`` completes."""
        if token_id in self._stop_ids:
            return ()
        if self._tokenizer.is_special(token_id):
            name = self._tokenizer.token_bytes(token_id).decode()
            return (*self._parser.text(self._detokenizer.finish()), *self._parser.control(name))
        return tuple(self._parser.text(self._detokenizer.add(token_id)))

    def finish(self) -> tuple[Part, ...]:
        """What is left when no token follows."""
        return tuple(self._rest())

    def _rest(self) -> Iterator[Part]:
        yield from self._parser.text(self._detokenizer.finish())
        yield from self._parser.finish()
