"""What the store is asked with, and what it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Position:
    """Where a row stands in the order of its queue. Its time and id are PostgreSQL's own text, to be given back as it is."""

    priority: int
    run_at: str
    id: str


@dataclass(frozen=True, slots=True)
class Best:
    """What a claim without hints is for: the best rows of these stretches.

    Attributes:
        stretches: queue, lowest and highest priority; best first.
        limit: rows at most.
        marked: also those that are marked, which have a hint in Redis.
        after: the place of one stretch, and the row there behind which to begin. What was committed or given back late before that
            row is missed, unless too little stands behind it.
        hinted: marked rows whose hints the worker has, beside `limit` others.
    """

    stretches: Sequence[tuple[str, int, int]]
    limit: int
    marked: bool = True
    after: tuple[int, Position] | None = None
    hinted: Sequence[UUID] = ()

    @property
    def queues(self) -> list[str]:
        """The queues, best first."""
        return list(dict.fromkeys(name for name, _, _ in self.stretches))


@dataclass(frozen=True, slots=True)
class Room:
    """A stretch of a queue's priorities that may be filled up in Redis: at most `limit` rows, if so many stand behind `after`."""

    queue_name: str
    low: int
    high: int
    limit: int
    after: Position | None = None


@dataclass(frozen=True, slots=True)
class Marked:
    """A row that was marked. `item` is the mission's JSON when it was asked for."""

    id: UUID
    queue_name: str
    kind: str | None
    priority: int
    run_at: datetime
    item: bytes | None


@dataclass(frozen=True, slots=True)
class MarkedList:
    """What was marked for one list.

    Attributes:
        ids: in order, with a space between them: they are passed on as they came, a thousand at a time.
        kinds: how many of each kind.
        items: in order, where whole items are pushed instead of the ids.
        last: where the last of them stands, as far as it was asked for.
    """

    ids: str
    kinds: Mapping[str | None, int]
    items: Sequence[bytes] = ()
    last: Position | None = None

    @property
    def count(self) -> int:
        """How many jobs."""
        return sum(self.kinds.values())


@dataclass(frozen=True, slots=True)
class ServedQueue:
    """A queue that at least one live instance serves; `slots`: jobs of it that can run at once, all instances together."""

    name: str
    active: bool
    slots: int


@dataclass(frozen=True, slots=True)
class QueuePulse:
    """One queue in a pulse. Queues without waiting jobs are not in it."""

    queue_name: str
    ready: bool  # something is due, and the queue is not paused
    served: bool
    due_in_seconds: float | None  # until the next job that is not due yet
    oldest_ready_seconds: float
    old_marks: bool  # a marked row at the head has been waiting: its hint may be lost


@dataclass(frozen=True, slots=True)
class Beat:
    """The answer to a beat."""

    lost: bool  # the lease has run out or is gone: take a new identity
    ticking: bool  # this instance made the tick
    tick: int
    claim_workers: list[str]  # workers of this instance with open claims
    claims: list[tuple[UUID, str]]  # these claims, and whose they are
    cancels: list[
        tuple[UUID, UUID]
    ]  # (job, claim token) that this instance runs and somebody wants cancelled
    orphans: bool  # there are claims of instances that are gone, or instances whose lease ran out
    pulse: list[QueuePulse]
    claims_in: int = 0  # ticks until something may be claimed again, after a failover


class Fate(StrEnum):
    """What becomes of a job whose owner died."""

    CHARGED = "charged"  # guilty: the attempt counts
    INTERRUPTED = "interrupted"  # cut by something else: the attempt is given back, five times a life
    UNSTARTED = "unstarted"  # user code did not run: as if it had not been claimed


@dataclass(frozen=True, slots=True)
class Held:
    """A claim that is open: jobs are settled under its token, or given back."""

    token: UUID
    ids: list[UUID]
    worker_id: str
    claimed_at: datetime


@dataclass(frozen=True, slots=True)
class Rescued:
    """A job that was given back, as it is now."""

    job_id: UUID
    queue_name: str
    kind: str | None
    status: str
    fate: Fate
    attempt_count: int
