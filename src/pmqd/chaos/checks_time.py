"""What the order and the pace of all claims say: was anybody overtaken, did anything stand still. Pure."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Final, TypeAlias

from pmqd.chaos.checks_history import Stretches

VISIBLE_US: Final = 500_000
"""A job counts as ready so long after its enqueue was acknowledged: until then a statement may not have seen it."""
LONG_US: Final = 2_000_000
"""Waits shorter than this cannot be part of a standstill that counts."""
STANDSTILL_SECONDS: Final = 5.0
"""How long nothing may be claimed while something is ready: twice the promised 2.5 s, as a busy machine is no fault."""
OVERTAKEN_MARKING: Final = 20
"""How many ready jobs with a better claim to be next may be passed over when jobs are marked or stolen: rows that another statement held locked."""
OVERTAKEN_CLAIMING: Final = 6_000
"""The same when jobs are claimed: a full window of 2,000 hints, a batch of 1,000 under way, and what workers had claimed ahead."""


Taken: TypeAlias = "tuple[array[int], array[int]]"
"""When each job was taken: when the transaction began, and when it wrote the row."""


@dataclass
class Line:
    """The jobs of one queue and band, in the order of their ids; microseconds on the database's clock.

    Attributes:
        priority: theirs.
        run_at: theirs.
        ready: from when on everybody could see that they were due.
        placed: when they were marked, or claimed without that: when that transaction began, and when it wrote the row.
        claimed: when they were claimed first, likewise.
        hinted: 1 for one that was claimed without a mark, and whose client may have pushed its hint (`pmqd.bypass`): that passes over
            all that waits for the migrator, however much that is while no migrator works.
    """

    priority: array[int] = field(default_factory=lambda: array("q"))
    run_at: array[int] = field(default_factory=lambda: array("q"))
    ready: array[int] = field(default_factory=lambda: array("q"))
    placed: Taken = field(default_factory=lambda: (array("q"), array("q")))
    claimed: Taken = field(default_factory=lambda: (array("q"), array("q")))
    hinted: array[int] = field(default_factory=lambda: array("b"))

    def add(
        self,
        priority: int,
        run_at: int,
        ready: int,
        placed: tuple[int, int],
        claimed: tuple[int, int],
        hinted: bool = False,
    ) -> None:
        """One job, later in id than those before."""
        self.priority.append(priority)
        self.run_at.append(run_at)
        self.ready.append(ready)
        for times, found in ((self.placed, placed), (self.claimed, claimed)):
            for each, moment in zip(times, found, strict=True):
                each.append(moment)
        self.hinted.append(hinted)


def most_overtaken(
    line: Line, taken: tuple[Sequence[int], Sequence[int]], disturbed: Stretches, excused: Sequence[int] = ()
) -> tuple[int, int, int]:
    """How many waiting jobs that should have come first a job has passed, at worst.

    What another transaction took that began before this one's rows were written was locked, or may have been: it was not passed over.

    Args:
        line: the jobs.
        taken: when each was taken (marked, or claimed): as in `Taken`.
        disturbed: times that do not count, because a fault acted.
        excused: 1 for each job that may pass others, which may not pass it; empty: none.

    Returns:
        That number, the place of the job in the line, and how many jobs were looked at.
    """
    rank = _ranks(line)
    waiting = _Counts(len(rank))
    is_waiting, is_gone = bytearray(len(rank)), bytearray(len(rank))
    worst, worst_job, looked_at = 0, -1, 0
    # What becomes visible at the very moment of a take was not passed over: takes first.
    comings = [(ready + VISIBLE_US, 1, job) for job, ready in enumerate(line.ready)]
    began, written = taken
    events = sorted([*comings, *((moment, 0, job) for job, moment in enumerate(began))])
    takes = [(moment, job) for moment, comes, job in events if not comes]
    for (moment, comes), group in groupby(events, key=itemgetter(0, 1)):
        batch = [job for _, _, job in group if not is_gone[job]]
        for job in batch:
            if comes:
                is_waiting[job] = 1
                waiting.add(rank[job], 1)
            else:  # one statement takes many at one time: all leave before anybody is asked for
                is_gone[job] = 1
                if is_waiting[job]:
                    waiting.add(rank[job], -1)
        judged = [job for job in batch if not (excused and excused[job])]
        if judged and not comes and moment not in disturbed:
            looked_at += len(judged)
            last = max(judged, key=rank.__getitem__)
            passed = waiting.below(rank[last])
            if passed > worst:
                end = max(written[job] for job in batch)
                beside = takes[
                    bisect_right(takes, (moment, len(rank))) : bisect_right(takes, (end, len(rank)))
                ]
                passed -= sum(is_waiting[job] and rank[job] < rank[last] for _, job in beside)
            worst, worst_job = max((worst, worst_job), (passed, last), key=itemgetter(0))
    return worst, worst_job, looked_at


def _ranks(line: Line) -> array[int]:
    """The place of each job in the order in which they should be taken, from 1."""
    count = len(line.ready)
    order = sorted(range(count), key=lambda job: (line.priority[job], line.run_at[job], job))
    rank = array("q", bytes(8 * count))
    for place, job in enumerate(order):
        rank[job] = place + 1
    return rank


class _Counts:
    """How many are present at or below each place: a Fenwick tree."""

    def __init__(self, size: int) -> None:
        self._sums = [0] * (size + 1)

    def add(self, place: int, number: int) -> None:
        sums, size = self._sums, len(self._sums)
        while place < size:
            sums[place] += number
            place += place & -place

    def below(self, place: int) -> int:
        """How many are present below a place."""
        sums, total = self._sums, 0
        place -= 1
        while place > 0:
            total += sums[place]
            place -= place & -place
        return total


@dataclass
class Pace:
    """Claims, and waits that were long, of queues whose workers are never busy for long; microseconds on the database's clock."""

    claims: array[int] = field(default_factory=lambda: array("q"))
    wait_starts: array[int] = field(default_factory=lambda: array("q"))
    wait_ends: array[int] = field(default_factory=lambda: array("q"))

    def add(self, ready: int, claimed: int) -> None:
        """A claim, of a job that was ready since then."""
        self.claims.append(claimed)
        if claimed - ready > LONG_US:
            self.wait_starts.append(ready)
            self.wait_ends.append(claimed)

    def longest_standstill(self, disturbed: Stretches) -> int:
        """The longest time without any claim while something was ready and no fault stood in the way."""
        moments = sorted(self.claims)
        gaps = [(start, end) for start, end in pairwise(moments) if end - start > LONG_US]
        if not gaps:
            return 0
        ends = [end for _, end in gaps]
        first_ready = [end for _, end in gaps]
        for ready, claimed in zip(self.wait_starts, self.wait_ends, strict=True):
            for place in range(bisect_right(ends, ready), bisect_left(ends, claimed + 1)):
                first_ready[place] = min(first_ready[place], ready)
        return max(
            disturbed.longest_outside(max(start, ready), end) if max(start, ready) < end else 0
            for (start, end), ready in zip(gaps, first_ready, strict=True)
        )
