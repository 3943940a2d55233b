"""`Returning`: whether those who were answered ask again at once, so that the next batch may wait for them."""

from __future__ import annotations

# of the time of a batch, for which the next waits for those who ask again, at most
SHARE_OF_BATCH = 0.5
# that must have asked again lately, for others to be waited for
MOST = 0.75
# of the last batch, in the share of those who ask again
WEIGHT = 0.25


class Returning:
    """How many requests are about to come, of clients that send the next as soon as one is answered.

    Without it, such clients part into two groups, and one computes while the other asks: every batch is half of what
    it could be. Where requests come at times of their own, few come so soon, and these are seldom waited for.

    `until` is by when the next must have come: `max_wait` after the last, or for each that was answered (to answer
    takes time, too); but no later than half of the time of the batch that was answered.

    Args:
        max_wait (`float`): Seconds.

    Example:

        >>> returning = Returning(max_wait=0.002)
        >>> for batch in range(10):
        ...     returning.answered(2, seconds=0.02, now=batch * 0.02)
        ...     returning.asked(now=batch * 0.02 + 0.001)
        ...     returning.asked(now=batch * 0.02 + 0.001)
        >>> returning.answered(2, seconds=0.02, now=0.2)
        >>> returning.awaited, round(returning.until, 3)
        (2, 0.204)
    """

    def __init__(self, max_wait: float):
        self._max_wait, self._share = max_wait, 0.0
        self._answered, self._again, self._latest = 0, 0, 0.0
        self.until = 0.0

    @property
    def awaited(self) -> int:
        """Requests that may still come before `until`; 0 where few have asked again lately."""
        return self._answered - self._again if self._share >= MOST else 0

    def answered(self, requests: int, seconds: float, now: float) -> None:
        """So many requests of a batch are answered, which took so long."""
        if self._answered:
            self._share += WEIGHT * (self._again / self._answered - self._share)
        self._answered, self._again, self._latest = requests, 0, now + SHARE_OF_BATCH * seconds
        self.until = min(now + requests * self._max_wait, self._latest)

    def arrives(self, now: float) -> None:
        """A request is to be decoded, and may turn out to be none; others may follow."""
        if now < self.until:
            self.until = min(max(self.until, now + self._max_wait), self._latest)

    def asked(self, now: float) -> None:
        """A request waits to be computed; others may follow."""
        self._again += now < self.until and self._again < self._answered
        self.arrives(now)
