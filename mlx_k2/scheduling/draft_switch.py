"""Draft switch: decides while one sequence runs whether drafts are computed. Knows no tokens and no clock.

At first the cost model decides. Then the seconds between two tokens are measured with and without drafts, and the
faster way is used. The other way is measured again from time to time, since the acceptance depends on the text.
"""

from collections.abc import Callable

_FIRST_TOKENS = 16
"""Tokens of the first measurement of each way."""
_TRIAL_TOKENS = 8
"""Tokens of each later measurement of the way that is not used."""
_TRIAL_EVERY = 512
_FADE = 0.9
_GAIN = 1.02
"""Drafts are switched on only if they are predicted or measured to be faster by this factor."""
EXPECTED_ACCEPTANCE = 0.6
"""Share of right drafts that the cost model assumes until drafts were measured."""


class DraftSwitch:
    """The choice between drafts and none, and the mean seconds of a token with each."""

    def __init__(self, predict: Callable[[], bool]) -> None:
        """``predict`` returns whether the cost model expects drafts to be faster."""
        self._predict = predict
        self._mean_s: dict[bool, float] = {}
        self._num_seen = {False: 0, True: 0}
        self._is_on: bool | None = None
        self._left = _FIRST_TOKENS
        self._is_trial = True

    @property
    def is_on(self) -> bool:
        """Whether the next token is followed by drafts."""
        if self._is_on is None:
            self._is_on = self._predict()
        return self._is_on

    def observe(self, seconds: float) -> None:
        """Add the seconds between the last two tokens, which were sampled as ``is_on`` says. Switch if it is time."""
        way = self.is_on
        self._num_seen[way] += 1
        if self._num_seen[way] > 1:  # the first one after a switch was begun in the other way
            old_s = self._mean_s.get(way, seconds)
            self._mean_s[way] = old_s * _FADE + seconds * (1 - _FADE)
        self._left -= 1
        if self._left:
            return
        self._num_seen[way] = 0
        is_known = len(self._mean_s) == 2
        if not is_known or not self._is_trial:
            self._is_on, self._is_trial = not way, True
            self._left = _TRIAL_TOKENS if is_known else _FIRST_TOKENS
            return
        self._is_on = self._mean_s[True] * _GAIN < self._mean_s[False]
        self._is_trial = False
        self._left = _TRIAL_EVERY
