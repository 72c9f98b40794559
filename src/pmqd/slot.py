"""One child's record in the arena: state, running jobs, claim batches, progress, and in the end its death.

A slot goes FREE → STARTING → IDLE ⇄ BUSY → DRAINING → DEAD → RESCUED → FREE. The master opens it, its child
moves it between STARTING and DRAINING, the master buries it after the reap, maintenance sets RESCUED once the
claims of the dead are given back, and only then may the master use it again.

No lock is needed: each word has one writer, 64-bit stores are whole, and what is longer than a word carries a
sequence number that is odd while it is being written.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple, Protocol
from uuid import UUID

WORD = 8
SETTLING = 512
WORKER_ID_WORDS = 15
POOL_WORDS = 16
ENTRY_WORDS = 8
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


KINDS = tuple(Kind)
REASONS = tuple(Reason)
LIVE = (State.STARTING, State.IDLE, State.BUSY, State.DRAINING)


class Running(NamedTuple):
    """One job whose user code runs; times are time.monotonic() seconds, deadline None means none."""

    job_id: UUID
    token: UUID
    started: float
    deadline: float | None


@dataclass(frozen=True, slots=True)
class Death:
    """How a child ended: exit code as multiprocessing tells it (negative: signal), and the job at fault, if known."""

    exit_code: int
    reason: Reason
    culprit: UUID | None
    at: float


class Int:
    """One word of the owner's record as an attribute."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __get__(self, owner: Any, _owner_type: object = None) -> int:
        return int(owner.words[owner.base + self.at])

    def __set__(self, owner: Any, value: int) -> None:
        owner.words[owner.base + self.at] = value


class Bool:
    """One word of the owner's record as a flag."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __get__(self, owner: Any, _owner_type: object = None) -> bool:
        return bool(owner.words[owner.base + self.at])

    def __set__(self, owner: Any, value: bool) -> None:
        owner.words[owner.base + self.at] = int(value)


def nanoseconds(moment: float) -> int:
    """A moment of time.monotonic() as the arena keeps it."""
    return int(moment * 1e9)


class Record:
    """Words and bytes of one stretch of the mapping."""

    def __init__(self, memory: mmap.mmap, words: memoryview[int], base: int) -> None:
        self.memory = memory
        self.words = words
        self.base = base

    def _put_uuid(self, at: int, value: UUID) -> None:
        start = (self.base + at) * WORD
        self.memory[start : start + 16] = value.bytes

    def _get_uuid(self, at: int) -> UUID:
        start = (self.base + at) * WORD
        return UUID(bytes=self.memory[start : start + 16])

    def _put_text(self, at: int, words: int, text: str) -> None:
        data = text.encode()[: words * WORD - WORD]
        start = (self.base + at + 1) * WORD
        self.memory[start : start + len(data)] = data
        self.words[self.base + at] = len(data)

    def _get_text(self, at: int) -> str:
        start = (self.base + at + 1) * WORD
        return self.memory[start : start + self.words[self.base + at]].decode(errors="replace")

    def _put_block(self, at: int, count: int, data: bytes) -> None:
        """Sequence word, count word, data: odd while the data is being replaced."""
        sequence = self.base + at
        self.words[sequence] |= 1
        start = (sequence + 2) * WORD
        self.memory[start : start + len(data)] = data
        self.words[sequence + 1] = count
        self.words[sequence] += 1

    def _get_block(self, at: int, unit: int) -> tuple[int, bytes] | None:
        """(sequence, data) or None where a writer was at work in each of a few looks."""
        sequence = self.base + at
        for _ in range(8):
            before = self.words[sequence]
            start = (sequence + 2) * WORD
            data = self.memory[start : start + self.words[sequence + 1] * unit]
            if before % 2 == 0 and before == self.words[sequence]:
                return int(before), data
        return None


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
    _culprit_at, _worker_id_at, _pool_at = 17, 19, 19 + WORKER_ID_WORDS
    _settling_at = 19 + WORKER_ID_WORDS + POOL_WORDS
    _tokens_at = _settling_at + 2 + SETTLING * 2

    def __init__(self, arena: Family, index: int, base: int) -> None:
        super().__init__(arena.memory, arena.words, base)
        self.arena = arena
        self.index = index
        self._entries_at = self._tokens_at + arena.tokens * TOKEN_WORDS

    @staticmethod
    def size(entries: int, tokens: int) -> int:
        """Words that one slot takes."""
        return Slot._tokens_at + tokens * TOKEN_WORDS + entries * ENTRY_WORDS

    # the master's side

    def open(
        self, kind: str, worker_id: str, *, pool: str = "", pool_index: int = -1, generation: int = 0
    ) -> None:
        """Make a clean record for a child about to be forked; STARTING comes last, so nobody sees a half one."""
        size = self.size(self.arena.entries, self.arena.tokens)
        start = self.base * WORD
        self.memory[start : start + size * WORD] = bytes(size * WORD)
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

    def begin(self, entry: int, job_id: UUID, token: UUID, deadline: float | None) -> None:
        """User code of a job starts in `entry` (0 ≤ entry < arena.entries; one thread per entry).

        Args:
            entry: the place, free at this moment.
            job_id: the job.
            token: its claim token.
            deadline: time.monotonic() seconds after which the master kills this process group; None: never.
        """
        at = self._entry(entry)
        self._put_uuid(at + 1, job_id)
        self._put_uuid(at + 3, token)
        self.words[self.base + at + 5] = time.monotonic_ns()
        self.set_deadline(entry, deadline)
        sequence = self.words[self.base + at]
        self.words[self.base + at] = (
            sequence + 1 + sequence % 2
        )  # odd: runs. Last: no reader sees half an entry

    def set_deadline(self, entry: int, deadline: float | None) -> None:
        """Move the hard deadline of what runs in `entry`."""
        self.words[self.base + self._entry(entry) + 6] = 0 if deadline is None else nanoseconds(deadline)

    def end(self, entry: int) -> None:
        """User code in `entry` is over; a second call changes nothing."""
        at = self.base + self._entry(entry)
        self.words[at] += self.words[at] % 2

    def add_token(self, token: UUID) -> bool:
        """Note a claim batch; False where all places are taken (the claims table knows it all the same)."""
        for place in range(self.arena.tokens):
            at = self._tokens_at + place * TOKEN_WORDS
            if not self.words[self.base + at]:
                self._put_uuid(at + 1, token)
                self.words[self.base + at] = 1
                return True
        return False

    def drop_token(self, token: UUID) -> None:
        """Forget a claim batch that is settled."""
        for place in range(self.arena.tokens):
            at = self._tokens_at + place * TOKEN_WORDS
            if self.words[self.base + at] and self._get_uuid(at + 1) == token:
                self.words[self.base + at] = 0

    def settling(self, ids: Sequence[UUID]) -> None:
        """Ids of a settle that is about to be sent; the first 512 are kept."""
        kept = ids[:SETTLING]
        self._put_block(self._settling_at, len(kept), b"".join(i.bytes for i in kept))

    def settled(self) -> None:
        """The settle was acknowledged."""
        self._put_block(self._settling_at, 0, b"")

    # anybody's side

    @property
    def state(self) -> State:
        """Where the slot stands."""
        return State(self._state)

    @state.setter
    def state(self, state: State) -> None:
        self._state = int(state)

    @property
    def kind(self) -> Kind:
        """What runs here."""
        return KINDS[self._kind]

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
            if sequence == self.words[self.base + at]:
                found.append(Running(job_id, token, started / 1e9, deadline / 1e9 if deadline else None))
        return found

    def tokens(self) -> list[UUID]:
        """Claim batches held."""
        places = (self._tokens_at + place * TOKEN_WORDS for place in range(self.arena.tokens))
        return [self._get_uuid(at + 1) for at in places if self.words[self.base + at]]

    def unsettled(self) -> list[UUID]:
        """Ids in a settle that nobody acknowledged."""
        block = self._get_block(self._settling_at, 16)
        data = block[1] if block else b""
        return [UUID(bytes=data[at : at + 16]) for at in range(0, len(data), 16)]

    def death(self) -> Death | None:
        """How the child ended; None while the master has not buried it."""
        if self.state not in (State.DEAD, State.RESCUED):
            return None
        culprit = self._get_uuid(self._culprit_at) if self._has_culprit else None
        return Death(self._exit_code, REASONS[self._reason], culprit, self._died_ns / 1e9)

    def _entry(self, entry: int) -> int:
        if not 0 <= entry < self.arena.entries:
            raise IndexError(f"entry {entry} of a slot; the arena has {self.arena.entries} per slot")
        return self._entries_at + entry * ENTRY_WORDS
