"""One child's record in the arena: state, running jobs, claim batches, progress, and in the end its death.

A slot goes FREE → STARTING → IDLE ⇄ BUSY → DRAINING → DEAD → RESCUED → FREE. The master opens it, its child
moves it between STARTING and DRAINING, the master buries it after the reap, maintenance sets RESCUED once the
claims of the dead are given back, and only then may the master use it again.

How memory is shared without a lock stands in record.py; outcomes that a dead worker leaves behind, in notes.py.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from struct import Struct
from typing import NamedTuple, Protocol
from uuid import UUID

from pmqd.notes import NOTES, Journal, Note, Notes, packed_places
from pmqd.record import WORD, Bool, Int, Record, nanoseconds

WORKER_ID_WORDS = 15
POOL_WORDS = 16
ENTRY_WORDS = 8
_ENTRY = Struct(
    "=16s16sqqq"
)  # after the sequence word: job, token, start, deadline, whether it must not outlive the lease
TOKEN_WORDS = 3


class State(IntEnum):
    """Where a slot stands; see the top of this file for who moves it."""

    FREE = 0
    STARTING = 1
    IDLE = 2
    BUSY = 3
    DRAINING = 4
    DEAD = 5
    RESCUED = 6


class Kind(StrEnum):
    """What a child is."""

    MIGRATOR = "migrator"
    WORKER = "worker"
    MAINTENANCE = "maintenance"
    WEB = "web"


class Reason(StrEnum):
    """Why a child ended (label of `pmqd_worker_exits_total`)."""

    RECYCLED = "recycled"
    DRAINED = "drained"
    SIGNAL = "signal"
    ERROR = "error"
    OOM = "oom"
    TIMEOUT = "timeout"
    HUNG = "hung"
    BOOT = "boot"
    ISOLATED = "isolated"


KINDS = tuple(Kind)
REASONS = tuple(Reason)
LIVE = (State.STARTING, State.IDLE, State.BUSY, State.DRAINING)


class Running(NamedTuple):
    """One job whose user code runs; times are time.monotonic() seconds, deadline None means none.

    `abort`: it must not outlive the lease, see `fence.py`.
    """

    job_id: UUID
    token: UUID
    started: float
    deadline: float | None
    abort: bool = False


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended: exit code as multiprocessing tells it (negative: signal), and the job at fault, if known."""

    exit_code: int
    reason: Reason
    culprit: UUID | None
    at: float


class Family(Protocol):
    """What a slot knows of its arena."""

    memory: mmap.mmap
    words: memoryview[int]
    entries: int
    tokens: int

    @property
    def bell_master(self) -> int:
        """Wakes the master."""

    def ring(self, bell: int) -> None:
        """Wakes whoever waits on `bell`."""

    def count_exit(self, reason: Reason) -> None:
        """Counts the end of a worker."""


class Slot(Record):
    """One child's record. The child writes it while it lives, the master before the fork and after the reap."""

    _state, _kind, pool_index = Int(0), Int(1), Int(2)
    generation, pid, ready = Int(3), Int(4), Bool(5)
    progress_count, _progress_ns = Int(6), Int(7)
    direct, rss_kb, jobs_done, busy_ns = Bool(8), Int(9), Int(10), Int(11)
    _opened_ns, _exit_code, _reason, _has_culprit, _died_ns = (
        Int(12),
        Int(13),
        Int(14),
        Bool(15),
        Int(16),
    )
    _culprit_at, _worker_id_at, _pool_at = 17, 20, 20 + WORKER_ID_WORDS
    isolated = Bool(19)  # set by whoever kills it because of the lease, before that
    unlisted = Int(20 + WORKER_ID_WORDS + POOL_WORDS)
    deep = Bool(
        21 + WORKER_ID_WORDS + POOL_WORDS
    )  # claims straight from PostgreSQL, as hundreds of quick jobs wait
    _tokens_at = 22 + WORKER_ID_WORDS + POOL_WORDS

    def __init__(self, arena: Family, index: int, base: int) -> None:
        super().__init__(arena.memory, arena.words, base)
        self.arena = arena
        self.index = index
        self._entries_at = self._tokens_at + arena.tokens * TOKEN_WORDS
        notes_at = self._entries_at + arena.entries * ENTRY_WORDS
        data_at = notes_at + NOTES + Journal.words_needed
        self._cleared = notes_at * WORD
        self.notes = Notes(arena.memory, arena.words, base + notes_at, (base + data_at) * WORD)
        self.journal = Journal(arena.memory, arena.words, base + notes_at + NOTES)

    @staticmethod
    def size(entries: int, tokens: int) -> int:
        """Words that one slot takes; most of them are never touched."""
        records = Slot._tokens_at + tokens * TOKEN_WORDS + entries * ENTRY_WORDS
        return records + NOTES + Journal.words_needed + Notes.data_bytes() // WORD

    # the master's side

    def open(
        self, kind: str, worker_id: str, *, pool: str = "", pool_index: int = -1, generation: int = 0
    ) -> None:
        """Make a clean record for a child about to be forked; STARTING comes last, so nobody sees a half one."""
        start = self.base * WORD
        self.memory[start : start + self._cleared] = bytes(self._cleared)
        self.notes.clear()
        self.journal.end()
        self._kind = KINDS.index(Kind(kind))
        self.pool_index = pool_index
        self.generation = generation
        self._put_text(self._worker_id_at, WORKER_ID_WORDS, worker_id)
        self._put_text(self._pool_at, POOL_WORDS, pool)
        self._opened_ns = time.monotonic_ns()
        self.state = State.STARTING

    def bury(self, exit_code: int, reason: Reason | str, culprit: UUID | None = None) -> None:
        """Write the death record after the reap; what ran, its tokens and counters stay readable beside it."""
        self._exit_code = exit_code
        self._reason = REASONS.index(Reason(reason))
        if culprit is not None:
            self._put_uuid(self._culprit_at, culprit)
        self._has_culprit = culprit is not None
        self._died_ns = time.monotonic_ns()
        self.deep = False
        self.state = State.DEAD
        if self.kind == Kind.WORKER:
            self.arena.count_exit(Reason(reason))

    def free(self) -> None:
        """Give the slot back; only the master, and for a worker only after RESCUED."""
        self.state = State.FREE

    # maintenance's side

    def rescued(self) -> None:
        """What the dead one held has been given back: the master may use the slot again (and is told)."""
        self.state = State.RESCUED
        self.arena.ring(self.arena.bell_master)

    # the child's side

    def progress(self) -> None:
        """Tell the master that the loop turns; a worker that has not for 15 s and runs nothing counts as hung."""
        self.progress_count += 1
        self._progress_ns = time.monotonic_ns()

    def begin(
        self, entry: int, job_id: UUID, token: UUID, deadline: float | None, *, abort: bool = False
    ) -> None:
        """User code of a job starts in `entry` (0 ≤ entry < arena.entries; one thread per entry).

        Args:
            entry: the place, free at this moment.
            job_id: the job.
            token: its claim token.
            deadline: time.monotonic() seconds after which the master kills this process group; None: never.
            abort: it must not outlive the instance's lease.
        """
        at = self.base + self._entry(entry)
        until = 0 if deadline is None else int(deadline * 1e9)
        _ENTRY.pack_into(
            self.memory,
            (at + 1) * WORD,
            job_id.int.to_bytes(16, "big"),  # `bytes` is a property: a call more
            token.int.to_bytes(16, "big"),
            time.monotonic_ns(),
            until,
            abort,
        )
        words = self.words
        words[at] = (words[at] + 1) | 1  # odd: runs. Last: no reader sees half an entry

    def set_deadline(self, entry: int, deadline: float | None) -> None:
        """Move the hard deadline of what runs in `entry`."""
        self.words[self.base + self._entry(entry) + 6] = 0 if deadline is None else nanoseconds(deadline)

    def end(self, entry: int) -> None:
        """User code in `entry` is over; a second call changes nothing."""
        at = self.base + self._entry(entry)
        sequence = self.words[at]
        self.words[at] = sequence + (sequence & 1)

    def add_token(self, token: UUID) -> bool:
        """Note a claim batch; False where all places are taken: then it is only counted, in `unlisted`."""
        for place in range(self.arena.tokens):
            at = self._tokens_at + place * TOKEN_WORDS
            if not self.words[self.base + at]:
                self._put_uuid(at + 1, token)
                self.words[self.base + at] = 1
                return True
        self.unlisted += 1
        return False

    def drop_token(self, token: UUID) -> None:
        """Forget a claim batch that is settled."""
        for place in range(self.arena.tokens):
            at = self._tokens_at + place * TOKEN_WORDS
            if self.words[self.base + at] and self._get_uuid(at + 1) == token:
                self.words[self.base + at] = 0
                return
        self.unlisted = max(0, self.unlisted - 1)

    # anybody's side

    @property
    def state(self) -> State:
        """Where the slot stands. A job may have written over the word: what is no state counts as alive and of no use."""
        found = self._state
        return State(found) if 0 <= found < len(State) else State.DRAINING

    @state.setter
    def state(self, state: State) -> None:
        self._state = int(state)

    @property
    def kind(self) -> Kind:
        """What runs here. Only workers run what may write over this."""
        found = self._kind
        return KINDS[found] if 0 <= found < len(KINDS) else Kind.WORKER

    @property
    def pool(self) -> str:
        """Name of the worker's pool; empty for a service."""
        return self._get_text(self._pool_at)

    @property
    def worker_id(self) -> str:
        """The child's name in PostgreSQL; new for every fork."""
        return self._get_text(self._worker_id_at)

    @property
    def live(self) -> bool:
        """Does a process live here (as far as the master has seen)?"""
        return self.state in LIVE

    def opened_age(self, now: float) -> float:
        """Seconds since the slot was opened for this child."""
        return now - self._opened_ns / 1e9

    def progress_age(self, now: float) -> float:
        """Seconds since the last progress; since the opening where there was none."""
        return now - (self._progress_ns or self._opened_ns) / 1e9

    def running(self) -> list[Running]:
        """Jobs whose user code runs (or ran when the process died); entries caught in the middle are left out."""
        found = []
        for entry in range(self.arena.entries):
            at = self._entry(entry)
            sequence = self.words[self.base + at]
            if sequence % 2 == 0:
                continue
            job_id, token = self._get_uuid(at + 1), self._get_uuid(at + 3)
            started, deadline = self.words[self.base + at + 5], self.words[self.base + at + 6]
            abort = bool(self.words[self.base + at + 7])
            if sequence == self.words[self.base + at]:
                found.append(
                    Running(job_id, token, started / 1e9, deadline / 1e9 if deadline else None, abort)
                )
        return found

    def tokens(self) -> list[UUID]:
        """Claim batches held."""
        places = (self._tokens_at + place * TOKEN_WORDS for place in range(self.arena.tokens))
        return [self._get_uuid(at + 1) for at in places if self.words[self.base + at]]

    def noted(self) -> list[Note]:
        """Outcomes that nobody has acknowledged."""
        return self.notes.all(self.worker_id)

    def death(self) -> Death | None:
        """How the child ended; None while the master has not buried it."""
        if self.state not in (State.DEAD, State.RESCUED):
            return None
        culprit = self._get_uuid(self._culprit_at) if self._has_culprit else None
        reason = REASONS[self._reason] if 0 <= self._reason < len(REASONS) else Reason.ERROR
        return Death(self._exit_code, reason, culprit, self._died_ns / 1e9)

    def _entry(self, entry: int) -> int:
        if not 0 <= entry < self.arena.entries:
            raise IndexError(f"entry {entry} of a slot; the arena has {self.arena.entries} per slot")
        return self._entries_at + entry * ENTRY_WORDS


@dataclass(frozen=True, slots=True)
class Receipt:
    """Makes a count of noted outcomes happen once, whoever dies in the middle: see `notes.Journal`.

    Attributes:
        slot: where they are noted.
        places: of the notes, released with the count.
        counting: called before the metric files are touched.
        counted: called when they hold it.
    """

    slot: Slot
    places: Sequence[int]
    counting: Callable[[], None]
    counted: Callable[[], None]

    def begin(self, changes: bytes) -> None:
        """What the metric files are about to hold."""
        self.slot.journal.begin(changes, packed_places(self.places))
        self.counting()

    def end(self) -> None:
        """They hold it: the notes are of no use any more."""
        self.slot.journal.counted()
        self.counted()
        self.slot.notes.release(self.places)
        self.slot.journal.end()
