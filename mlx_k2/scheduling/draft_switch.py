"""Draft switch: decides while one sequence runs whether drafts are computed. Knows no tokens and no clock.

At first the cost model decides. Then the seconds between two tokens are measured with and without drafts, and the
faster setting is used. The other one is measured again from time to time, since the acceptance depends on the text.
"""

from collections.abc import Callable

_FIRST_TOKENS = 16  # number of tokens of the first measurement of each setting, of which 15 are timed
_TRIAL_TOKENS = 8  # number of tokens of each later measurement of the unused setting, of which 7 are timed
_TOKENS_BETWEEN_TRIALS = 512
_FADE = 0.9  # factor on a time's weight in its mean after each later time: about the last 10 times count
_MIN_GAIN = 1.02  # drafts stay on only if they are measured to be faster by this factor
EXPECTED_ACCEPTANCE = 0.6  # fraction of right drafts that the cost model assumes until drafts were measured


class DraftSwitch:
    """The choice whether drafts are on, and the mean seconds of a token with drafts and without."""

    def __init__(self, predict: Callable[[], bool]) -> None:
        """``predict`` returns whether the cost model expects drafts to be faster."""
        self._predict = predict
        self._mean_s: dict[bool, float] = {}  # by whether drafts were on
        self._is_on: bool | None = None
        self._is_trial = True  # the present setting is used only to measure it
        self._num_left = _FIRST_TOKENS  # tokens until the next decision
        self._has_just_switched = True

    @property
    def is_on(self) -> bool:
        """True if the next token is followed by drafts."""
        if self._is_on is None:
            self._is_on = self._predict()
        return self._is_on

    def observe(self, seconds: float) -> None:
        """Add the seconds between the last two tokens to the mean of the present setting. Switch if it is time."""
        is_on = self.is_on
        if not self._has_just_switched:  # else the first of the two tokens was sampled with the other setting
            mean_s = self._mean_s.get(is_on, seconds)
            self._mean_s[is_on] = mean_s * _FADE + seconds * (1 - _FADE)
        self._has_just_switched = False
        self._num_left -= 1
        if self._num_left:
            return
        self._has_just_switched = True
        are_both_measured = len(self._mean_s) == 2
        if are_both_measured and self._is_trial:
            self._is_on = self._mean_s[True] * _MIN_GAIN < self._mean_s[False]
            self._is_trial, self._num_left = False, _TOKENS_BETWEEN_TRIALS
        else:
            self._is_on = not is_on
            self._is_trial, self._num_left = True, _TRIAL_TOKENS if are_both_measured else _FIRST_TOKENS
