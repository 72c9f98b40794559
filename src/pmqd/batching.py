"""How many jobs a worker claims at once, in which order it looks at the lists, how long it waits: decisions only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

AHEAD_SECONDS: Final = 0.020
"""How much work, in time, is claimed beyond what runs: enough to hide a round trip, too little to delay a better job."""
BATCH_CAP: Final = 1000
"""The most jobs of one claim, and the most that wait in a worker."""
SAMPLES: Final = 128
"""How many recent durations are looked at. Their p99 leaves one outlier out, not two."""
SWITCH_SECONDS: Final = 0.0005
"""How long a thread may keep the interpreter from another: ten times shorter than Python's own choice, because the clerk needs it for
moments, several times per batch, beside a handler that computes,"""
FLOOD_SWITCH_SECONDS: Final = 0.005
"""but not while hundreds of quick jobs wait: then nobody waits for the clerk, and each turn costs more than a job."""
_QUICK_AHEAD: Final = 100
_DEEP_FROM: Final = 200
DEEP_HINTS: Final = 50
"""How many hints are asked for at once where jobs are claimed straight from PostgreSQL: the fewer, the fewer are marked meanwhile."""
URGENT_CAP: Final = 250
URGENT_SECONDS: Final = 5.0
"""For so long after a job of the high band came before others that waited, claims are no larger than that: the next one waits for the
end of the claim that is under way."""
FLUSH_SECONDS: Final = 0.005
"""How long the settle of a finished job may wait for company,"""
FLOOD_FLUSH_SECONDS: Final = 0.025
"""and while other jobs wait here: the next claim is near then, and takes it along."""
FRESH_POP_SECONDS: Final = 0.002
"""A pop that has not answered for so long found nothing: no claim is about to share the settle's commit."""

QUICK_SECONDS: Final = 100e-6
"""Plain handlers of which most take no longer are run one after the other,"""
MIXED_SECONDS: Final = 0.001
"""unless the others among them take so long that the mean is above this."""
STALL_SECONDS: Final = 0.002
"""When jobs wait and none was started for so long, something that runs is not quick."""

_TRIED_SECONDS: Final = 0.005
_TRY_EVERY_SECONDS: Final = 0.25
_KNOWN_FROM: Final = 8
_TAIL_WEIGHT: Final = 8
"""On a busy machine the p99 of quick jobs is the time slice that another process got, not work: it counts an eighth."""
_LEAST_SECONDS: Final = 20e-6  # what pmqd itself spends on a job: no handler is faster than that
_ROTATE_EVERY: Final = 16
_STEAL_FIRST, _STEAL_MOST = 0.01, 0.25
_AWAY_FIRST, _AWAY_MOST = 0.05, 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Load:
    """How much a worker has to do.

    Attributes:
        concurrency: jobs that may run at once.
        busy: jobs that run, or are on their way into their thread.
        waiting: jobs claimed and not started.
        since_start: seconds since a job was last started here.
        held: whether a job is held back until it can run alone.
        urgent: whether all that wait are of the high band.
    """

    concurrency: int
    busy: int
    waiting: int
    since_start: float
    held: bool = False
    urgent: bool = False


@dataclass(slots=True)
class Spread:
    """How many plain handlers of one process are started side by side while jobs wait: one, or as many as there are places.

    Python runs one thread at a time. Handlers that take microseconds and run in many threads spend more on taking turns than
    on their work, so one thread does them one after the other. Where one of them takes longer, more places are used.

    Attributes:
        concurrency: places there are.
        places: how many may be taken.
        look_at: when one is tried again (monotonic seconds): what was measured side by side includes the turns.
    """

    concurrency: int
    places: int = 1
    look_at: float = 0.0

    def observe(self, durations: Sequence[float], now: float) -> None:
        """Learns how long the jobs have taken (s, at least one) that have just ended."""
        usual = sorted(durations)[len(durations) // 2]
        if usual <= QUICK_SECONDS and math.fsum(durations) <= MIXED_SECONDS * len(durations):
            self.places = 1
        elif self.places == 1:
            self.places, self.look_at = self.concurrency, now + _TRY_EVERY_SECONDS
        elif now >= self.look_at and usual < _TRIED_SECONDS:
            self.places, self.look_at = 1, now + _TRY_EVERY_SECONDS

    def stalled(self, since_start: float) -> None:
        """Learns that jobs wait though there are places, and for how long none has been started (s)."""
        if since_start > STALL_SECONDS:
            self.places = min(self.concurrency, 2 * self.places)


def p99(durations: Sequence[float]) -> float:
    """The duration (s) that 99 of 100 do not exceed; 0 for none."""
    ordered = sorted(durations)
    return ordered[math.ceil(len(ordered) * 0.99) - 1] if ordered else 0.0


def ahead(durations: Sequence[float], concurrency: int) -> int:
    """How many jobs may wait in a worker beyond those that run.

    Args:
        durations: of recent jobs (s), at most `SAMPLES` of them.
        concurrency: jobs that run at once.

    Returns:
        As many as start within `AHEAD_SECONDS` by the mean, or by an eighth of the p99 where that is more; 0 when handlers are
        slow, or too few have been seen.
    """
    if len(durations) < _KNOWN_FROM:
        return 0
    mean = math.fsum(durations) / len(durations)
    each = max(mean, p99(durations) / _TAIL_WEIGHT, _LEAST_SECONDS)
    return min(BATCH_CAP, int(AHEAD_SECONDS / each * concurrency))


def room(load: Load, room_ahead: int) -> int:
    """How many more jobs may be claimed at this moment.

    Free places, and beyond them what may wait; but nothing ahead while jobs run and none has started for
    `AHEAD_SECONDS`: then those that run are slower than what was measured, and what waits would better be elsewhere.

    Args:
        load: how much there is to do.
        room_ahead: from `ahead`.
    """
    if load.held:
        return 0
    free = load.concurrency - load.busy - load.waiting
    stalled = load.busy > 0 and load.since_start > AHEAD_SECONDS
    return max(0, free if stalled else min(BATCH_CAP, free + room_ahead))


def wanted(load: Load, room_ahead: int) -> int:
    """How many hints to ask for now: as many as there is room for, but in batches.

    A free place is filled at once; beyond that nothing is asked for while more than half of what may wait still waits.
    The answer may come much later: `room` decides then how many of the hints are claimed.

    Args:
        load: how much there is to do.
        room_ahead: from `ahead`.
    """
    full = load.concurrency <= load.busy + load.waiting
    return 0 if full and load.waiting > low_water(room_ahead) else room(load, room_ahead)


def is_flood(load: Load) -> bool:
    """Whether jobs wait here because those before them are many, not because they are slow: a better one may go before them."""
    return load.waiting > 0 and not (load.held or load.urgent) and load.since_start <= AHEAD_SECONDS


def is_deep(claimed: int, *, already: bool = False) -> bool:
    """Whether so many jobs came at once that the next ones are cheaper to claim straight from PostgreSQL.

    Args:
        claimed: by the last claim.
        already: it was one straight from PostgreSQL.
    """
    return claimed >= (DEEP_HINTS if already else _DEEP_FROM)


def switch_seconds(load: Load, room_ahead: int) -> float:
    """How long a thread may keep the interpreter from another."""
    return FLOOD_SWITCH_SECONDS if is_flood(load) and room_ahead >= _QUICK_AHEAD else SWITCH_SECONDS


def low_water(room_ahead: int) -> int:
    """At how many waiting jobs the next batch is claimed."""
    return room_ahead // 2


def flush_seconds(waiting: int) -> float:
    """How long the settle of a finished job may wait while so many others wait to be started."""
    return FLOOD_FLUSH_SECONDS if waiting else FLUSH_SECONDS


def settle_wait(oldest_age: float, popping_for: float | None, load: Load) -> float:
    """Seconds that finished jobs may still wait for their settle; 0 or less is now.

    Args:
        oldest_age: seconds since the first of them ended.
        popping_for: seconds since a pop was asked for that has not answered; None where none is under way.
        load: how much more there is to do here.
    """
    left = flush_seconds(load.waiting) - oldest_age
    if load.busy or load.waiting:
        return left
    return min(left, 0.0 if popping_for is None else FRESH_POP_SECONDS - popping_for)


def lists(queues: Sequence[str], order: str) -> list[tuple[str, str]]:
    """The lists of a pool as (queue, band), first to serve first.

    Args:
        queues: the pool's queues, most important first.
        order: "bands" (all high lists, then normal, then low) or "queues" (all of the first queue, then the second).
    """
    bands = ("high", "normal", "low")
    if order == "queues":
        return [(queue, band) for queue in queues for band in bands]
    return [(queue, band) for band in bands for queue in queues]


def rotated(keys: Sequence[T], number: int) -> Sequence[T]:
    """The keys for one pop: in order, but every 16th begins elsewhere, so that no list starves for ever.

    Args:
        keys: all keys in order.
        number: which pop this is.
    """
    if number % _ROTATE_EVERY or not keys:
        return keys
    start = number // _ROTATE_EVERY % len(keys)
    return [*keys[start:], *keys[:start]]


def steal_pause(misses: int) -> float:
    """Seconds between two looks into PostgreSQL without Redis, after `misses` that found nothing."""
    return min(_STEAL_MOST, _STEAL_FIRST * 2.0 ** min(misses, 30))


def away_pause(failures: int, random01: float) -> float:
    """Seconds until PostgreSQL is asked again, after `failures` in a row.

    Args:
        failures: from 1.
        random01: a random number from 0.0 to 1.0: not all workers come back at the same instant.
    """
    return min(_AWAY_MOST, _AWAY_FIRST * 2.0 ** min(failures - 1, 30)) * (0.5 + random01)
