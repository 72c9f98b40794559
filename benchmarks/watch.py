"""Looks at the slots while jobs run, at next to no cost: the two cores belong to what is measured."""

import mmap
import time
from collections.abc import Callable

from benchmarks.peers.arena import Arena, Failure
from benchmarks.peers.workers import Workers

STALL_SECONDS = 60.0
_POLL_SECONDS = 0.005
_CHECK_SECONDS = 1.0


class Watch:
    """Follows the starts of jobs, or another stretch of slots.

    Args:
        arena: whose slots.
        workers: asked now and then whether they live.
        first: the first slot.
        jobs: how many.
    """

    def __init__(self, arena: Arena, workers: Workers, first: int = 0, jobs: int | None = None) -> None:
        self._workers = workers
        self._jobs = arena.jobs if jobs is None else jobs
        with arena.slots.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._slots = memoryview(self._map).cast("q")[first : first + self._jobs]
        self._filled = 0  # all before this one are filled, and never looked at again

    def count(self) -> int:
        """How many are filled."""
        return sum(map(bool, self._slots))

    def until_first(self) -> None:
        """Waits for the first."""
        self._until(lambda: bool(self._slots.tobytes().strip(b"\0")))  # the quickest look at a million

    def until_all(self, until: float = float("inf")) -> bool:
        """Waits for all, or until a time (monotonic seconds); whether it was all."""
        self._until(lambda: self._all_filled() or time.monotonic() > until)
        return self._all_filled()

    def close(self) -> None:
        """Lets go of the file."""
        self._slots.release()
        self._map.close()

    def _all_filled(self) -> bool:
        slots, at = self._slots, self._filled
        while at < self._jobs and slots[at]:
            at += 1
        self._filled = at
        return at == self._jobs

    def _until(self, predicate: Callable[[], bool]) -> None:
        seen, moved = -1, time.monotonic()
        checked = moved
        while not predicate():
            now = time.monotonic()
            if now - checked > _CHECK_SECONDS:
                checked = now
                self._workers.check()
                if now - moved > STALL_SECONDS / 2 and (count := self.count()) != seen:
                    seen, moved = count, now
                if now - moved > STALL_SECONDS:
                    raise Failure(
                        f"nothing moved for {STALL_SECONDS:g} s: {self.count():,} of {self._jobs:,} jobs were seen"
                    )
            time.sleep(_POLL_SECONDS)
