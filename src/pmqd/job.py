"""What a job is: its states, bands, names and ids, what a claim gives and what a settle writes. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import UUID, SafeUUID

from pmqd.errors import EnqueueError, shown

if TYPE_CHECKING:  # psycopg only names a type here, and retry.py imports this module
    import psycopg

    from pmqd.retry import Discard


class Status(StrEnum):
    """The states of a job, as they stand in `jobs.status`."""

    QUEUED = "queued"
    MIGRATED_TO_REDIS = "migrated_to_redis"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL: Final = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED})
"""States that a job leaves only by a replay."""

BAND_RANGES: Final = {"high": (1, 50), "normal": (51, 150), "low": (151, 32767)}
"""Lowest and highest priority of each band, best band first. Lower numbers run first."""

DEFAULT_PRIORITY: Final = 100
DEFAULT_MAX_ATTEMPTS: Final = 3
LOWEST_PRIORITY: Final = 32767
MAX_ATTEMPTS_LIMIT: Final = 1000
MAX_PAYLOAD_BYTES: Final = 256 * 1024
TOO_LARGE: Final = f"a payload of more than {MAX_PAYLOAD_BYTES:,} bytes of JSON is not allowed; store what is large elsewhere and pass its key"
MAX_KIND_LENGTH: Final = 200

_QUEUE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,99}")
_BAND_SUFFIXES = (":high", ":low")
_NOTE_LENGTH = 200
_set_number = UUID.__dict__["int"].__set__
_set_safety = UUID.__dict__["is_safe"].__set__
_UNKNOWN_SAFETY: Final = SafeUUID.unknown  # an enumeration's members are slow to be looked up


def band_of(priority: int) -> str:
    """The band of a priority.

    Args:
        priority: 1 to 32767, lower runs first.

    Returns:
        "high", "normal" or "low".

    Raises:
        ValueError: The priority is outside its range.
    """
    for band, (low, high) in BAND_RANGES.items():
        if low <= priority <= high:
            return band
    raise ValueError(f"priority {priority!r} is not allowed: 1 to 32767, lower runs first")


def is_queue_name(name: object) -> bool:
    """Whether a queue may have this name (the database checks the same)."""
    return isinstance(name, str) and bool(_QUEUE_NAME.fullmatch(name)) and not name.endswith(_BAND_SUFFIXES)


def check_queue_name(name: object) -> None:
    """Refuses a name that no queue may have, before it gets near a key or a statement.

    Raises:
        EnqueueError: Names the value and what is allowed.
    """
    if is_queue_name(name):
        return
    raise EnqueueError(
        f"queue name {shown(name)} is not allowed: 1 to 100 characters, letters, digits and _ . : -, "
        "a letter or digit first, not ending in :high or :low"
    )


def display_status(status: str, attempt_count: int, run_at: datetime, now: datetime) -> str:
    """The state as people see it: a queued job that waits for its next attempt is `retry_scheduled`.

    Args:
        status: `jobs.status`.
        attempt_count: Attempts charged so far.
        run_at: Due time (aware).
        now: The database's time (aware).

    Returns:
        The status, or "retry_scheduled".
    """
    if status == Status.QUEUED and attempt_count > 0 and run_at > now:
        return "retry_scheduled"
    return str(status)


def moment(seconds: float) -> datetime:
    """So many seconds after 1970 (aware, to the microsecond)."""
    return datetime.fromtimestamp(seconds, UTC)


def uuid_of(number: int) -> UUID:
    """The id with this number (below 2^128), made in a third of the time that its class needs to look at all it could be made of.

    psycopg's own loader makes them so too.
    """
    made = object.__new__(UUID)
    _set_number(made, number)
    _set_safety(made, _UNKNOWN_SAFETY)
    return made


def uuid7(ms: int, fraction: int, random_bits: int) -> UUID:
    """An id whose order is the order of its time (RFC 9562 section 6.2, method 3).

    Args:
        ms: Milliseconds since 1970.
        fraction: The part below a millisecond, in 1/4096 ms (0 to 4095).
        random_bits: 62 random bits; higher bits are ignored.

    Returns:
        A UUID of version 7.
    """
    time_bits = (ms & 0xFFFF_FFFF_FFFF) << 16 | 0x7000 | fraction & 0xFFF
    return uuid_of(time_bits << 64 | 1 << 63 | random_bits & 0x3FFF_FFFF_FFFF_FFFF)


@dataclass(slots=True)
class Claimed:
    """A row won by a claim: it belongs to the holder of `token` until that settles it.

    Like `Outcome` made once for every job, and never changed; not frozen, which would make it four times as slow to make.
    """

    id: UUID
    queue_name: str
    kind: str | None
    priority: int
    payload: str  # JSON text
    attempt_count: int  # with this attempt
    interruptions: int
    max_attempts: int
    run_at: float  # seconds since 1970
    created_at: float
    tags: Sequence[str]
    alone: bool  # nothing else may run in the process beside it
    claimed_at: float  # seconds since 1970 on the database's clock
    token: UUID


class Action(StrEnum):
    """What a settle does to its row."""

    COMPLETE = "complete"  # completed; log success
    RETRY = "retry"  # queued at now + delay; log retry
    FAIL = "fail"  # failed; log failed
    SNOOZE = "snooze"  # queued at now + delay, attempt given back; log released
    RELEASE = "release"  # queued, attempt given back: user code did not start; no log
    INTERRUPT = "interrupt"  # queued, attempt given back while interruptions < 5; log released
    CANCEL = "cancel"  # cancelled; log cancelled


@dataclass(slots=True)
class Outcome:
    """What a settle writes for one job; `token` must still be the row's."""

    job_id: UUID
    token: UUID
    action: Action
    attempt_number: int
    queue_name: str
    kind: str | None
    worker_id: str
    result: bytes | None = None  # JSON text
    error: str | None = None
    delay_seconds: float = 0.0  # retry, snooze; release: look again then
    started: float | None = None  # seconds since 1970 on the database's clock; None: user code did not start
    duration_seconds: float = 0.0


class JobPort(Protocol):
    """What a worker gives a `Job` to speak through."""

    def progress(self, job: Job, fraction: float, note: str) -> None:
        """Shows how far the job is (0.0 to 1.0); best effort, never raises."""

    def settling(
        self, job: Job, outcome: Discard | None, result: Any
    ) -> AbstractContextManager[psycopg.Connection[Any]]:
        """A connection in a transaction that settles the job when it commits."""

    def transaction(self, job: Job) -> AbstractContextManager[psycopg.Connection[Any]]:
        """A connection in a transaction that leaves the job as it is."""


class Job:
    """The job that a handler runs. Everything here is read-only.

    `claim_token` is new with each claim: a system outside can keep the newest one it has seen of a job and refuse an older one.
    """

    __slots__ = ("_claimed", "_payload", "_port", "_worker_id")

    def __init__(self, claimed: Claimed, payload: Any, worker_id: str, port: JobPort) -> None:
        """Looks at a claimed row.

        Args:
            claimed: The row.
            payload: Its payload, decoded.
            worker_id: Who runs it.
            port: What `progress` and `settling` speak through.
        """
        self._claimed = claimed
        self._payload = payload
        self._worker_id = worker_id
        self._port = port

    @property
    def id(self) -> UUID:
        """`jobs.id`."""
        return self._claimed.id

    @property
    def queue_name(self) -> str:
        """The queue that it was enqueued to."""
        return self._claimed.queue_name

    @property
    def kind(self) -> str | None:
        """Which task runs it; None: the handler of its queue."""
        return self._claimed.kind

    @property
    def payload(self) -> Any:
        """What it was enqueued with."""
        return self._payload

    @property
    def priority(self) -> int:
        """1 to 32767, lower runs first."""
        return self._claimed.priority

    @property
    def attempt_count(self) -> int:
        """The number of this attempt, from 1."""
        return self._claimed.attempt_count

    @property
    def interruptions(self) -> int:
        """How often it was cut by something that was not its fault."""
        return self._claimed.interruptions

    @property
    def max_attempts(self) -> int:
        """After so many charged attempts it has failed."""
        return self._claimed.max_attempts

    @property
    def run_at(self) -> datetime:
        """When it was due."""
        return moment(self._claimed.run_at)

    @property
    def created_at(self) -> datetime:
        """When it was enqueued."""
        return moment(self._claimed.created_at)

    @property
    def tags(self) -> tuple[str, ...]:
        """What it can be found by."""
        return tuple(self._claimed.tags)

    @property
    def worker_id(self) -> str:
        """Who runs it."""
        return self._worker_id

    @property
    def claim_token(self) -> UUID:
        """The token of this claim."""
        return self._claimed.token

    def __repr__(self) -> str:
        """What a person wants to know of it in a log."""
        return f"<Job {self.id} {self.kind or self.queue_name!r} attempt {self.attempt_count} of {self.max_attempts}>"

    def progress(self, fraction: float, note: str = "") -> None:
        """Shows how far the job is, in `job:ID` and where people look.

        Args:
            fraction: 0.0 to 1.0; what lies outside is cut to that.
            note: A few words, at most 200 characters of which are kept.

        Raises:
            ValueError: The fraction is not a number.
        """
        if math.isnan(fraction):
            raise ValueError("progress(fraction=nan): a number from 0.0 to 1.0 is needed")
        self._port.progress(self, min(1.0, max(0.0, fraction)), note[:_NOTE_LENGTH])

    def settling(
        self, outcome: Discard | None = None, result: Any = None
    ) -> AbstractContextManager[psycopg.Connection[Any]]:
        """Ties the job's end to the handler's own writes: both commit, or neither.

        The block runs in a transaction on the connection it gets; at its end the job is settled there.
        What the handler returns afterwards is not stored any more.

        Args:
            outcome: None completes the job, a `Discard` makes it failed.
            result: Stored with a completed job, as it is at the end of the block: a dict may be filled in it.

        Returns:
            A context manager that gives the connection.

        Raises:
            SettleRefused: At the end of the block, when the job was taken from this worker meanwhile; nothing
                of the block is committed then.
        """
        return self._port.settling(self, outcome, result)

    def transaction(self) -> AbstractContextManager[psycopg.Connection[Any]]:
        """A transaction that commits at the end of the block, while the job goes on: for what must be known before it ends.

        So a handler writes down what it is about to do outside PostgreSQL, such as a mail that it is going to hand over.
        It runs on a connection as `settling` gives one, and PostgreSQL's absence is no fault of the job here either.
        It says nothing about whose job it is: only `settling` does.

        Returns:
            A context manager that gives the connection.
        """
        return self._port.transaction(self)


def is_text(value: object) -> bool:
    """Whether PostgreSQL takes it as text: no NUL, no half surrogate pair."""
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def tags_of(tags: Iterable[str]) -> tuple[str, ...]:
    """Checks tags: several texts, not one text.

    Raises:
        EnqueueError: Names the value and what is allowed.
    """
    found = (tags,) if isinstance(tags, str) else tuple(tags)
    if isinstance(tags, str) or not all(is_text(tag) for tag in found):
        raise EnqueueError(
            f"tags={shown(tags)} is not allowed: a list of texts without NUL, e.g. ['campaign:42']"
        )
    return found
