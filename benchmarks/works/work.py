"""What a work is, and what all works share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from benchmarks.peers.arena import Arena
from benchmarks.peers.field import Contestant
from benchmarks.peers.workers import Workers

OURS: Final = "pmqd"
BARE: Final = ("copy", "copy-ready", "insert")
"""Not peers: the statements that an enqueue of pmqd is compared with."""

Figures = Sequence[tuple[str, float]]
"""(unit, value); the first is the one that the work is about."""


@dataclass(frozen=True)
class Scale:
    """What the command line says about the size; None: the work's own."""

    jobs: int | None = None
    seconds: float | None = None

    def jobs_or(self, usual: int) -> int:
        """How many jobs."""
        return self.jobs or usual

    def seconds_or(self, usual: float) -> float:
        """How long."""
        return self.seconds or usual


@dataclass(frozen=True)
class Work:
    """One kind of measurement.

    Attributes:
        name: as it is named on the command line.
        about: what is done, in a sentence.
        peers: who can be measured, and how; pmqd first, then its variants.
    """

    name: str
    about: str
    peers: Mapping[str, Callable[[Scale], Figures]]

    @property
    def own(self) -> bool:
        """Whether pmqd is only compared with itself: then nobody can be left out."""
        return all(is_ours(name) or name in BARE for name in self.peers)


def is_ours(name: str) -> bool:
    """Whether a contestant is pmqd in some way."""
    return name.startswith(OURS)


@contextmanager
def running(contestant: Contestant, arena: Arena) -> Iterator[Workers]:
    """Its workers, ended after the block."""
    workers = contestant.workers(arena)
    workers.start()
    try:
        yield workers
    finally:
        workers.stop()


def rate(times: Sequence[int], share: float = 1.0) -> float:
    """Jobs per second between the first and the last of sorted instants (ns), or in their middle share."""
    cut = round(len(times) * (1 - share) / 2)
    middle = times[cut : len(times) - cut]
    return (len(middle) - 1) / ((middle[-1] - middle[0]) / 1e9)
