"""Token masks: the tokens that may be sampled at one position. Knows neither logits nor requests."""

import enum
from array import array
from collections.abc import Collection

import msgspec


class MaskForm(enum.Enum):
    """Forms of a token mask's data."""

    BITS = "bits"
    """Bit ``i % 8`` (least significant first) of byte ``i // 8`` is 1 if token ``i`` is allowed."""
    ONLY = "only"
    """The allowed token ids, each as 4 bytes, least significant first."""
    ALL_BUT = "all but"
    """The excluded token ids, each as 4 bytes, least significant first."""


class TokenMask(msgspec.Struct, frozen=True):
    """The tokens that may be sampled. ``form`` states the meaning of ``data``; the creator chooses a short form."""

    form: MaskForm
    data: bytes

    @classmethod
    def only(cls, token_ids: Collection[int]) -> "TokenMask":
        """Return the mask that allows ``token_ids``."""
        return cls(MaskForm.ONLY, id_bytes(token_ids))

    @classmethod
    def all_but(cls, token_ids: Collection[int]) -> "TokenMask":
        """Return the mask that excludes ``token_ids``."""
        return cls(MaskForm.ALL_BUT, id_bytes(token_ids))

    def allows(self, token_id: int) -> bool:
        """Return whether ``token_id`` may be sampled."""
        if self.form is MaskForm.BITS:
            return bool(self.data[token_id // 8] >> token_id % 8 & 1)
        is_listed = token_id in memoryview(self.data).cast("I")
        return is_listed if self.form is MaskForm.ONLY else not is_listed


def id_bytes(token_ids: Collection[int]) -> bytes:
    """Return token ids as 4 bytes each, least significant first."""
    return array("I", token_ids).tobytes()  # in the machine's byte order: all supported machines are little-endian
