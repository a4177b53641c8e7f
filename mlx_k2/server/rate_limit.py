"""A limit on the rate of cheap requests. Knows no HTTP."""

import time

from mlx_k2.server.api_errors import ApiError


class RateLimit:
    """A limit of ``per_s`` requests a second for each owner of a key; as many may come at once. For one event loop."""

    def __init__(self, per_s: int) -> None:
        self._per_s = per_s
        self._used: dict[str, tuple[float, float]] = {}
        """For each owner: the requests that count, and the time of that number."""

    def check(self, owner: str) -> None:
        """Count a request.

        Raises:
            ApiError: 429, the owner has sent too many.
        """
        now = time.monotonic()
        count, then = self._used.get(owner, (0.0, now))
        count = max(0.0, count - (now - then) * self._per_s)
        if count + 1 > self._per_s:
            message = f"more than {self._per_s} such requests in a second"
            raise ApiError(429, "rate_limit_error", message, code="rate_limit_exceeded", headers={"retry-after": "1"})
        self._used[owner] = (count + 1, now)
