"""How the load and its faults wait for each other: neither is to be over long before the other."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

PACE: Final = "pace"
"""The file in the run's folder that tells the producers which part of the load may be done by now."""
EASE_SECONDS: Final = 2.0
"""The load between two faults is let go at half its amount in so long, and ever slower: there is always some."""
STALLED_SECONDS: Final = 5.0
"""Without progress for so long the next fault comes by time: a product that is stuck must not hide from the rest."""
TELL_SECONDS: Final = 0.1


def allowed(begun: int, faults: int, eased: float) -> float:
    """Which part of the load may be done when so many faults have begun: up to where the next one is due, and a little more."""
    return (begun + max(eased, 0.6 if begun == 0 else 0.0)) / (faults + 1)


class Pace:
    """When a fault is due, and how far the load may be meanwhile: neither is to be over long before the other.

    A fault is due by the load's progress, by time where that stands still, and never right after another.
    """

    def __init__(self, progress: Callable[[], float], faults: int, path: Path) -> None:
        self._progress, self._faults, self._path = progress, faults, path
        self._begun = 0
        self._seen = -1.0
        self._moved = time.monotonic()
        self._last: float | None = None
        self._told = float("-inf")

    def began(self) -> None:
        """A fault has begun."""
        self._begun += 1
        self._last = self._moved = time.monotonic()

    def is_due(self, at: float, gap: float) -> bool:
        """Whether a fault of this part of the load, so many seconds after the last one, may begin now."""
        now, done = time.monotonic(), self._progress()
        if done > self._seen:
            self._seen, self._moved = done, now
        rested = self._last is None or now - self._last >= gap
        return rested and (done >= at or now - self._moved >= STALLED_SECONDS)

    def tell(self) -> None:
        """Writes down which part of the load may be done by now."""
        now = time.monotonic()
        if now - self._told < TELL_SECONDS:
            return
        self._told = now
        eased = 1 - 1 / (1 + (now - (self._last or now)) / EASE_SECONDS)
        self._write(allowed(self._begun, self._faults, eased))

    def end(self) -> None:
        """The load may be done: no fault needs it any more."""
        self._write(1.0)

    def _write(self, share: float) -> None:
        part = self._path.with_suffix(".part")
        part.write_text(f"{share:.6f}\n")
        part.rename(self._path)
