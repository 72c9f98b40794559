"""How much of a queue lies in Redis, and when the migrator looks again: decisions only, no I/O and no clock.

A *list* is one band of one queue in Redis. Its window is measured in time: what its workers take in a quarter of
a second, by the rate at which the list was seen to drain. So a queue of slow jobs keeps a handful of hints there,
a fast one up to two thousand, and a backlog of millions costs Redis nothing. Lists do not share their room: a flood of newsletters
never takes the place of a receipt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

WINDOW_CAP = 2000
"""Hints in one list at most: the script that reads lists reads this many."""
WINDOW_SECONDS = 0.25
"""How much work, in seconds at the drain rate, a list holds."""

_BLEND_SECONDS = 0.1
_FORGET_SECONDS = 10.0
_SAMPLE_MIN_SECONDS = 0.002
_LOOK_MIN, _LOOK_MAX = 0.002, 0.05
_LENGTH_VALID_SECONDS, _LENGTH_OLD_SECONDS = 0.001, 0.02

AWAKE_ABOVE, ASLEEP_BELOW = (0.5, 1000.0), (0.1, 200.0)
"""Share of the time spent delivering, and jobs a second, above both of which inserts need not notify; and below either of
which they must again. Share alone would not do: a client that waits for each of its jobs keeps a migrator half busy."""
AWAKE_LOOK_SECONDS = 0.008
"""How often an awake migrator looks, as nobody tells it: each look costs as much as marking some fifty jobs, found or not."""
DEEP_LOOK_SECONDS = 0.03
"""The same while workers claim straight from PostgreSQL: what is marked then is for those that wait for hints."""
_BUSY_SECONDS = 0.25

URGENT_SECONDS, URGENT_LOOK_SECONDS, URGENT_BATCH = 5.0, 0.004, 500
"""For so long after a job of the high band came beside others, an awake migrator looks so often, and marks at most so many at once:
what is urgent waits for the end of the mark that is under way."""

_GAP_FIRST, _GAP_CAP, _LOOKS_SECONDS = 0.001, 0.1, 1.2


@dataclass(frozen=True, slots=True)
class Flow:
    """What is known of one list.

    Attributes:
        length: hints in it when it was last heard of.
        heard: when that was (monotonic seconds).
        rate: hints a second that leave it, as measured.
        backlog: whether rows were left over when it was last filled.
    """

    length: int = 0
    heard: float = 0.0
    rate: float = 0.0
    backlog: bool = False


@dataclass(frozen=True, slots=True)
class Wanted:
    """Room for `count` more hints in the list of this queue and band."""

    queue_name: str
    band: str
    count: int


def observe(flow: Flow, length: int, now: float, added: int = 0) -> Flow:
    """What is known after the list's length was heard.

    Args:
        flow: what was known before.
        length: hints in the list now, those just added among them.
        now: monotonic seconds.
        added: hints pushed by ourselves in the same call that told the length.
    """
    gap = now - flow.heard
    if gap <= 0:
        return replace(flow, length=length)
    # Over less than two milliseconds a single pop looks like a flood.
    sample = max(0, flow.length + added - length) / max(gap, _SAMPLE_MIN_SECONDS)
    return replace(flow, length=length, heard=now, rate=_blend(flow.rate, sample, gap, dry=length <= added))


def _blend(rate: float, sample: float, gap: float, *, dry: bool) -> float:
    """The new drain rate.

    A list that was found dry says only that its workers are at least this fast: they may have waited. So such a sample never
    lowers the rate (time does, slowly) and doubles as a guess: the window of a flood grows within a few looks.
    """
    if dry:
        return max(2 * sample, rate * math.exp(-gap / _FORGET_SECONDS))
    weight = 1 - math.exp(-gap / _BLEND_SECONDS)
    return rate + weight * (sample - rate)


def window(flow: Flow, slots: int, *, deep: bool = False) -> int:
    """How many hints the list should hold: two for each job slot that serves it, or a quarter of a second of work.

    Deep, one for each slot: workers that claim straight from PostgreSQL pass what is marked, and take few hints at a time.
    """
    if deep:
        return min(WINDOW_CAP, max(1, slots))
    return min(WINDOW_CAP, max(2 * max(1, slots), math.ceil(WINDOW_SECONDS * flow.rate)))


def room(flow: Flow, slots: int, *, deep: bool = False) -> int:
    """How many hints to add: none while the window is more than half full, so that a refill is worth a round trip."""
    size = window(flow, slots, deep=deep)
    return 0 if flow.length > size // 2 else size - flow.length


def look_in(flow: Flow, slots: int, now: float) -> float:
    """Seconds until a list with a backlog has presumably fallen to half its window: 2 to 50 ms after it was heard of."""
    surplus = flow.length - window(flow, slots) // 2
    if surplus <= 0:
        return 0.0
    expected = surplus / flow.rate if flow.rate > 0 else _LOOK_MAX
    return max(0.0, min(_LOOK_MAX, max(_LOOK_MIN, expected)) - (now - flow.heard))


def asks(flow: Flow, slots: int, now: float) -> bool:
    """Whether to ask Redis for the list's length: it was full, or drains and is probably low enough for a refill.

    A drain is seldom steady, so it is asked about now and then in any case.
    """
    age = now - flow.heard
    if age <= _LENGTH_VALID_SECONDS:
        return False
    if flow.backlog:
        return age > _LENGTH_OLD_SECONDS or look_in(flow, slots, now) < _LOOK_MIN
    return not room(flow, slots)


def left_over(wanted: Sequence[Wanted], counts: Sequence[int], batch_size: int) -> list[Wanted]:
    """What is wanted still after a mark: nothing, unless the batch was full before all lists were.

    Args:
        wanted: what that mark was to fill, in order.
        counts: how many each got.
        batch_size: how many it could mark in all.
    """
    if sum(counts) < batch_size:
        return []
    last = max(place for place, count in enumerate(counts) if count)
    rest = wanted[last].count - counts[last]
    # A small rest is not worth a mark of its own: it comes with the list's next refill.
    rest_of_list = [replace(wanted[last], count=rest)] if rest > batch_size // 2 else []
    return [*rest_of_list, *wanted[last + 1 :]]


@dataclass(frozen=True, slots=True)
class Pace:
    """How busy the migrator is: share of its recent time spent delivering, jobs a second, and when that was reckoned."""

    share: float = 0.0
    rate: float = 0.0
    at: float = 0.0


def busier(pace: Pace, now: float, busy_seconds: float, moved: int) -> Pace:
    """The pace after a round that spent so many seconds on delivering so many jobs (0 and 0: it found nothing)."""
    gap = max(now - pace.at, busy_seconds, 1e-6)
    weight = 1 - math.exp(-gap / _BUSY_SECONDS)
    share = pace.share + weight * (min(1.0, busy_seconds / gap) - pace.share)
    return Pace(share, pace.rate + weight * (moved / gap - pace.rate), now)


def stays_awake(pace: Pace, *, awake: bool) -> bool:
    """Whether inserts need not notify: a NOTIFY takes a database-wide lock, and the migrator is looking anyway."""
    share, rate = ASLEEP_BELOW if awake else AWAKE_ABOVE
    return pace.share > share and pace.rate > rate


@dataclass(frozen=True, slots=True)
class Looks:
    """Looks at growing intervals, until a time: for what commits or falls due without a further word."""

    next: float
    gap: float
    until: float


def look_again(looks: Looks | None, now: float) -> Looks:
    """Looks from now on for a little more than a second, when the next pulse has come; running ones go on."""
    if looks is not None:
        return replace(looks, until=now + _LOOKS_SECONDS)
    return Looks(next=now + _GAP_FIRST, gap=_GAP_FIRST, until=now + _LOOKS_SECONDS)


def looked(looks: Looks | None, now: float) -> Looks | None:
    """The looks that are left after one at this time."""
    if looks is None or now < looks.next:
        return looks
    gap = min(_GAP_CAP, 2 * looks.gap)
    return replace(looks, next=now + gap, gap=gap) if now + gap <= looks.until else None


def jittered(seconds: float, random01: float) -> float:
    """About so many seconds (±25 %): many children that lost the same server do not come back in step.

    Args:
        seconds: the middle.
        random01: a random number, 0 ≤ x < 1.
    """
    return seconds * (0.75 + 0.5 * random01)
