"""What the producers of a chaos run enqueue, by seed: nearly all of it quick, and a slowly growing number of difficult jobs. Pure."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from pmqd.chaos import application as load
from pmqd.job import DEFAULT_MAX_ATTEMPTS, DEFAULT_PRIORITY

SPECIAL_SHARE: Final = 0.025
"""At most this share of all jobs is anything but quick."""
_MANY: Final = 100_000


@dataclass(frozen=True, slots=True)
class Wish:
    """A job that is to be enqueued; `kind` None: a queue's handler runs it."""

    kind: str | None
    queue: str
    arguments: dict[str, Any] = field(default_factory=dict)
    max_attempts: int = DEFAULT_MAX_ATTEMPTS
    priority: int = DEFAULT_PRIORITY
    delay_seconds: float = 0.0
    cancel: bool = False


def _mixed(kind: str, **arguments: Any) -> Wish:
    return Wish(kind, load.MIXED, arguments)


def _rough(kind: str, random: Random) -> Wish:
    """Half of them give in at the second attempt, the others never."""
    return Wish(kind, load.ROUGH, {"times": random.choice((1, 9))}, max_attempts=2)


def _slow(random: Random, jobs: int) -> Wish:
    kind, queue = random.choice((("slow", load.MIXED), ("slow_async", load.ASYNC)))
    most = 1.0 if jobs < _MANY else 2.0
    return Wish(kind, queue, {"seconds": round(random.uniform(0.05, most), 3)}, cancel=random.random() < 0.2)


def _long(random: Random, jobs: int) -> Wish:
    return _mixed("slow", seconds=round(random.uniform(5.0, 8.0 if jobs < _MANY else 20.0), 1))


# kind of difficulty: how many per root of the number of jobs, and what one is like
_SPECIALS: Final[dict[str, tuple[float, Callable[[Random, int], Wish]]]] = {
    "slow": (0.4, _slow),
    "long": (0.02, _long),
    "flaky": (
        0.8,
        lambda random, _: _mixed("flaky", failures=random.choice((1, 1, 2)), asks=random.random() < 0.5),
    ),
    "failing": (
        0.3,
        lambda random, _: Wish("failing", load.MIXED, {"discards": random.random() < 0.5}, max_attempts=2),
    ),
    "stubborn": (
        0.1,
        lambda random, _: Wish(
            "stubborn", load.MIXED, {"seconds": round(random.uniform(1.0, 3.0), 1)}, cancel=True
        ),
    ),
    "snoozing": (0.2, lambda random, _: _mixed("snoozing", until=round(random.uniform(0.5, 2.0), 2))),
    "timing_out": (
        0.04,
        lambda random, _: Wish("timing_out", load.MIXED, {"times": random.choice((1, 9))}, max_attempts=2),
    ),
    "settles_itself": (0.8, lambda _random, _jobs: _mixed("settles_itself")),
    "big_result": (0.05, lambda random, _: _mixed("big_result", size=random.randrange(1000, 200_000))),
    "progress": (0.2, lambda random, _: _mixed("progress", steps=random.randrange(2, 20))),
    "cancelled": (
        0.3,
        lambda random, _: Wish("quick", load.MAIL, delay_seconds=random.uniform(1.0, 4.0), cancel=True),
    ),
    "crash_exit": (0.02, lambda random, _: _rough("crash_exit", random)),
    "crash_segv": (0.02, lambda random, _: _rough("crash_segv", random)),
    "crash_kill": (0.02, lambda random, _: _rough("crash_kill", random)),
    "slow_to_die": (0.015, lambda random, _: _rough("slow_to_die", random)),
}


def specials(jobs: int, seed: int) -> list[Wish]:
    """The difficult jobs of a run, in the order in which they are to come.

    Their number grows with the root of the number of jobs, so that a large run is not a slow one. What takes longest
    comes in the first half, so that nobody waits for it at the end.
    """
    random = Random(f"specials {seed}")  # noqa: S311 - a schedule, no secret
    root = jobs**0.5
    wanted = {name: max(1.0, share * root) for name, (share, _) in _SPECIALS.items()}
    scale = min(1.0, SPECIAL_SHARE * jobs / sum(wanted.values()))
    found: list[tuple[float, Wish]] = []
    for name, (_, make) in _SPECIALS.items():
        for _ in range(_rounded(wanted[name] * scale, random)):
            place = random.random() * (0.5 if name == "long" else 1.0)
            found.append((place, make(random, jobs)))
    return [wish for _, wish in sorted(found, key=lambda each: each[0])]


def _rounded(number: float, random: Random) -> int:
    """The whole number below or above, so that the average is right where it is less than one."""
    return int(number) + (random.random() < number - int(number))


_PRIORITIES: Final = (DEFAULT_PRIORITY,) * 12 + (60, 120, 120, 200, 300, 300, 10, 50)


def quick(random: Random) -> Wish:
    """One quick job, of some queue, priority and time."""
    kind, queue = random.choices(
        (
            ("quick", load.MAIL),
            ("quick_bulk", load.BULK),
            (None, load.PLAIN),
            ("quick_async", load.ASYNC),
        ),
        (50, 30, 15, 5),
    )[0]
    delay = random.uniform(0.3, 5.0) if random.random() < 0.01 else 0.0
    return Wish(kind, queue, priority=random.choice(_PRIORITIES), delay_seconds=delay)


_PULSES: Final = ("settles_itself", "settles_itself", "slow", "flaky", "progress")


def pulse(random: Random) -> Wish:
    """One difficult job that is soon done."""
    return _SPECIALS[random.choice(_PULSES)][1](random, 0)
