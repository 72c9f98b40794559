"""How far a worker's claims without hints have come in a queue: the next one begins behind the last row won."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from pmqd.job import Claimed, moment
from pmqd.store_types import Best, Position

FROM_HEAD_SECONDS: Final = 0.25
"""So often a claim looks from the head all the same: rows come back, and commit late."""


class Reach:
    """The last row of one worker's last claim without hints, if more stood behind it.

    What stands before it are the entries of rows that were claimed, in the index until the next vacuum, and rows that others hold locked.
    """

    def __init__(self) -> None:
        self._place: tuple[tuple[str, int, int], Position] | None = None
        self._from_head_at = 0.0

    def behind(self, wanted: Best, now: float) -> Best:
        """The same, behind what was won before (now: monotonic seconds)."""
        if self._place is None or now - self._from_head_at >= FROM_HEAD_SECONDS:
            self._from_head_at = now
            return wanted
        stretch, row = self._place
        if stretch not in wanted.stretches:
            return wanted
        return replace(wanted, after=(list(wanted.stretches).index(stretch), row))

    def won(self, wanted: Best, claimed: Sequence[Claimed]) -> None:
        """Learns what that has won."""
        self._place = None
        hinted = {each.int for each in wanted.hinted}  # those come first
        by_hint = sum(each.id.int in hinted for each in claimed[: len(hinted)])
        if len(claimed) - by_hint >= wanted.limit:
            last = claimed[-1]
            for stretch in wanted.stretches:
                name, low, high = stretch
                if name == last.queue_name and low <= last.priority <= high:
                    self._place = (
                        stretch,
                        Position(last.priority, moment(last.run_at).isoformat(), str(last.id)),
                    )
