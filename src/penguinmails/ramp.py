"""The ramp of a new sending account, and the plan of one of its days: pure, no clock.

Mailbox providers distrust a sender whose volume jumps (Google's sender guidelines: raise it slowly, watch rejections and the
spam rate, and go back when they rise). So a day's volume follows from the day before and what became of it.
"""

import math
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from random import Random
from zoneinfo import ZoneInfo

CEILING_REACHED = "the ceiling is reached"
ENOUGH = 0.5
"""Part of a day's plan that must have gone out before the day says anything."""


class Decision(StrEnum):
    """What a day's figures do to the volume."""

    RAISE = "raise"
    HOLD = "hold"
    LOWER = "lower"


@dataclass(frozen=True, slots=True)
class Ramp:
    """How volume grows, in letters a day.

    Attributes:
        start: the first day's, and the least.
        growth: a day's volume over the day before, 1 or more.
        ceiling: the most.
    """

    start: int
    growth: float
    ceiling: int

    def __post_init__(self) -> None:
        """Refuse what is no ramp.

        Raises:
            ValueError: names the field, its value and what is allowed.
        """
        if self.start < 1:
            raise ValueError(f"start is {self.start}, allowed: 1 or more letters a day")
        if not 1 <= self.growth <= 10:
            raise ValueError(
                f"growth is {self.growth:g}, allowed: 1 to 10, a day's volume over the day before"
            )
        if not self.start <= self.ceiling <= 100_000:
            raise ValueError(
                f"ceiling is {self.ceiling}, allowed: start ({self.start}) to 100000 letters a day"
            )


@dataclass(frozen=True, slots=True)
class Hours:
    """The working hours of a day: from one full hour to another one, as clocks in `zone` show them."""

    zone: ZoneInfo
    first: int
    last: int

    def window(self, day: date) -> tuple[datetime, datetime]:
        """When they begin and end on this day, in UTC. An hour that the clocks skip leaves less of them, or nothing."""
        begin = self._at(day, self.first)
        return begin, max(begin, self._at(day, self.last))

    def day_of(self, now: datetime) -> date:
        """Which day it is there."""
        return now.astimezone(self.zone).date()

    def bounds(self, day: date) -> tuple[datetime, datetime]:
        """Midnight and the next midnight, in UTC."""
        return self._at(day, 0), self._at(day, 24)

    def next_plan(self, now: datetime) -> tuple[date, datetime]:
        """The first day whose working hours are not over, and when to plan it: as they begin, or now."""
        day = self.day_of(now)
        begin, end = self.window(day)
        if now >= end:
            day += timedelta(days=1)
            begin, _ = self.window(day)
        return day, max(begin, now)

    def _at(self, day: date, hour: int) -> datetime:
        day, hour = (day + timedelta(days=1), 0) if hour == 24 else (day, hour)
        return datetime.combine(day, time(hour), self.zone).astimezone(UTC)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Rates, 0 to 1: from `hold` on the volume is not raised, from `lower` on it is lowered."""

    bounce_hold: float
    bounce_lower: float
    complaint_hold: float
    complaint_lower: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What became of an account's mails of a day; each of them is in one of these at most."""

    sent: int = 0
    bounced: int = 0
    complained: int = 0

    @property
    def bounce_rate(self) -> float:
        """Of all that servers said yes or no to."""
        return self.bounced / max(self.sent + self.complained + self.bounced, 1)

    @property
    def complaint_rate(self) -> float:
        """Of all that was delivered, as mailbox providers count it."""
        return self.complained / max(self.sent + self.complained, 1)


@dataclass(frozen=True, slots=True)
class Step:
    """The decision about a day, the volume that follows, and why, in words."""

    decision: Decision
    volume: int
    reason: str


def step(ramp: Ramp, volume: int, planned: int, figures: Figures, limits: Thresholds) -> Step:
    """Raises, holds or lowers the volume by what became of a day's mails.

    Lowered it is half, never below the start; raised it grows by the ramp's factor, rounded up, never above the ceiling.

    Args:
        ramp: its bounds.
        volume: letters a day, as it was that day.
        planned: how many letters were planned.
        figures: what became of them, and of the account's other mails.
        limits: the rates that count.
    """
    volume = max(ramp.start, min(volume, ramp.ceiling))
    rates = (
        ("bounce", figures.bounce_rate, limits.bounce_hold, limits.bounce_lower),
        ("complaint", figures.complaint_rate, limits.complaint_hold, limits.complaint_lower),
    )
    for what, rate, _, lower in rates:
        if rate >= lower:
            return Step(
                Decision.LOWER,
                max(ramp.start, volume // 2),
                f"{what} rate {rate:.2%}, lowered from {lower:.2%}",
            )
    for what, rate, hold, _ in rates:
        if rate >= hold:
            return Step(Decision.HOLD, volume, f"{what} rate {rate:.2%}, held from {hold:.2%}")
    if figures.sent < planned * ENOUGH or not figures.sent:
        return Step(Decision.HOLD, volume, f"{figures.sent} sent of {planned} planned: too few to tell")
    more = min(math.ceil(round(volume * ramp.growth, 6)), ramp.ceiling)
    if more == volume:
        return Step(Decision.HOLD, more, CEILING_REACHED if more == ramp.ceiling else "growth is 1")
    reason = f"bounce rate {figures.bounce_rate:.2%}, complaint rate {figures.complaint_rate:.2%}"
    return Step(Decision.RAISE, more, reason)


def plan_day(hours: Hours, day: date, volume: int, *, seed: str, now: datetime) -> list[datetime]:
    """When the letters of a day go out: spread evenly over the working hours, each at a random moment of its share.

    Args:
        hours: the working hours.
        day: the day.
        volume: letters on a whole day.
        seed: the same seed and arguments make the same plan.
        now: what is over by then is left out, and so are that part's letters: a plan made late hurries nothing.

    Returns:
        Moments in UTC, in their order; `volume` of them where none of the hours is over.
    """
    begin, end = hours.window(day)
    start = min(max(begin, now.astimezone(UTC)), end)
    left = (end - start) / (end - begin) if end > begin else 0.0
    number = math.ceil(round(volume * left, 6))
    chance = Random(seed)  # noqa: S311 - jitter, not a secret
    share = (end - start) / max(number, 1)
    return [start + share * (each + chance.random()) for each in range(number)]


def seeds_of_day(seeds: tuple[str, ...], number: int, *, seed: str) -> list[str]:
    """Who gets the letters of a day: all seed mailboxes in turn, in an order of the day's own."""
    order = list(seeds)
    Random(seed).shuffle(order)  # noqa: S311 - as above
    return [order[each % len(order)] for each in range(number)]


def reply_at(hours: Hours, now: datetime, *, seed: str) -> datetime:
    """When a letter is answered: after 5 to 60 minutes, or so long after the next working hours begin, if these are over by then."""
    wait = timedelta(minutes=Random(seed).uniform(5, 60))  # noqa: S311 - as above
    at = now.astimezone(UTC) + wait
    day, begin = hours.next_plan(at)
    return at if begin == at else min(begin + wait, hours.window(day)[1])
