"""Token ids to text as they come, never half a character. Knows no messages and no control flow."""

import codecs

from mlx_k2.text.tokenizer import Tokenizer


class Detokenizer:
    """Decodes one sequence. All of ``add`` and then ``finish`` together equal the whole decoded at once.

    Bytes that are no UTF-8 become U+FFFD; control tokens read as their names, so leave out those not to be seen.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The text that ``token_id`` completes: '' while it leaves a character unfinished."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What an unfinished character at the end becomes; the next ``add`` starts a new text."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
