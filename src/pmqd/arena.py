"""What all processes of an instance see at once: one anonymous shared mapping, made before the first fork.

The master reads here what a dead child was doing, without asking a database; children read here what
maintenance last saw. Nothing in it decides who owns a job: PostgreSQL does. So a torn or late read may cost a
moment, never a job. Each word has one writer; the slots are in slot.py.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict
from uuid import UUID

import orjson

from pmqd.notes import Journal
from pmqd.record import WORD, Bool, Int, Record, nanoseconds
from pmqd.slot import LIVE, REASONS, Death, Kind, Reason, Running, Slot, State

__all__ = ["LIVE", "Arena", "Death", "Kind", "QueuePulse", "Reason", "Running", "Slot", "State", "boottime"]

STEAL_CELLS = 64
CANCELS = 256
PULSE_BYTES = 1 << 20


def boottime() -> float:
    """Seconds on a clock that goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class QueuePulse(TypedDict):
    """One queue as the last pulse saw it; `due_at` is on this host's monotonic clock."""

    queue_name: str
    ready: bool
    served: bool
    due_at: float | None
    oldest_ready_seconds: float
    old_marks: bool


class Arena(Record):
    """The whole mapping: a header, then the slots. Made by the master, used by all after the fork."""

    _beat_ns, _lease_ns = Int(0), Int(1)
    draining, redis_down, store_down = Bool(2), Bool(3), Bool(4)
    reoffer_requests, backoff = Int(5), Int(6)
    _pulse_ns = Int(7)
    _held_ns, _identity_ns = Int(8), Int(9)
    _exits_at = 10
    _steals_at = _exits_at + len(REASONS)
    _instance_at = _steals_at + STEAL_CELLS
    _cancels_at = _instance_at + 5
    _pulse_at = _cancels_at + 2 + CANCELS * 4
    _server_at = _pulse_at + 2 + PULSE_BYTES // WORD
    cluster, timeline = Int(_server_at), Int(_server_at + 1)  # the newest life of PostgreSQL that was seen
    _journal_at = _server_at + 2
    _slots_at = _journal_at + Journal.words_needed

    def __init__(self, slots: int, entries: int, tokens: int) -> None:
        self.entries = entries
        self.tokens = tokens
        size = (self._slots_at + slots * Slot.size(entries, tokens)) * WORD
        memory = mmap.mmap(-1, size)  # shared and anonymous: no name, no file, gone with the last process
        super().__init__(memory, memoryview(memory).cast("q"), 0)
        self.slots = [
            Slot(self, index, self._slots_at + index * Slot.size(entries, tokens)) for index in range(slots)
        ]
        flags = os.EFD_NONBLOCK | os.EFD_CLOEXEC
        self.bell_maintenance = os.eventfd(0, flags)
        self.bell_migrator = os.eventfd(0, flags)
        self.bell_master = os.eventfd(0, flags)
        self.journal = Journal(memory, self.words, self._journal_at)  # what maintenance counts
        self._pulse_cache: tuple[int, dict[str, QueuePulse]] = (-1, {})

    @classmethod
    def create(cls, slots: int, entries: int, tokens: int = 64) -> Arena:
        """Map a new arena.

        Args:
            slots: children that can stand in it at once, the dead ones that wait for their rescue included.
            entries: jobs that one worker can run at once.
            tokens: claim batches that one worker can hold at once.
        """
        return cls(slots, entries, tokens)

    # bells

    @staticmethod
    def ring(bell: int) -> None:
        """Wake whoever waits on `bell`; rings before it wakes are one."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(bell, 1)

    @staticmethod
    def answer(bell: int) -> bool:
        """Take the rings off `bell`; was there any?"""
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(bell) > 0
        return False

    def bell_of(self, kind: str) -> int | None:
        """The bell that wakes a child of this kind, if it has one."""
        return {Kind.MAINTENANCE: self.bell_maintenance, Kind.MIGRATOR: self.bell_migrator}.get(Kind(kind))

    @property
    def bells(self) -> tuple[int, ...]:
        """All bells (file descriptors that every child keeps)."""
        return self.bell_maintenance, self.bell_migrator, self.bell_master

    # the master's heartbeat, the lease, the identity

    def beat_master(self) -> None:
        """The master's loop turned."""
        self._beat_ns = time.monotonic_ns()

    def master_age(self, now: float) -> float:
        """Seconds since the master's loop last turned."""
        return now - self._beat_ns / 1e9 if self._beat_ns else math.inf

    def lease_renewed(self, asked: float | None = None) -> None:
        """The instance's lease was renewed in PostgreSQL.

        Args:
            asked: `boottime()` before the request was sent: the lease lasts from then on, or longer. None: just now.
        """
        self._lease_ns = time.monotonic_ns()
        self._held_ns = nanoseconds(boottime() if asked is None else asked)

    def lease_age(self, now: float) -> float:
        """Seconds since the last renewal; infinite before the first."""
        return now - self._lease_ns / 1e9 if self._lease_ns else math.inf

    def lease_spent(self) -> float:
        """How much of the lease may be gone at most, in seconds: counted through suspends, and from the request on."""
        return boottime() - self._held_ns / 1e9 if self._held_ns else math.inf

    def spare_lease(self, seconds: float) -> None:
        """For so long PostgreSQL was certainly away for everybody: no lease aged (maintenance only)."""
        self._held_ns = nanoseconds(min(boottime(), self._held_ns / 1e9 + seconds))

    @property
    def instance_id(self) -> UUID:
        """The instance's identity: set by the master at the start, by maintenance after a lost lease."""
        found = self._get_pair(self._instance_at)
        if found is None:
            raise LookupError("the arena holds no instance id yet")
        return found

    @instance_id.setter
    def instance_id(self, value: UUID) -> None:
        self._put_pair(self._instance_at, value)
        # Afterwards: whoever read the old one has looked at the clock before that.
        self._identity_ns = time.monotonic_ns()

    @property
    def identity_since(self) -> float:
        """When the identity was taken (monotonic seconds): what was claimed before that is held by no lease any more."""
        return self._identity_ns / 1e9

    # counts by the master

    def count_exit(self, reason: Reason) -> None:
        """One worker ended for this reason (the master counts, it loads no metrics library)."""
        self.words[self._exits_at + REASONS.index(reason)] += 1

    def exits(self) -> dict[str, int]:
        """Workers that ended, by reason, since the start."""
        return {reason.value: int(self.words[self._exits_at + at]) for at, reason in enumerate(REASONS)}

    # pulse, cancels, steals

    def set_pulse(self, pulses: Iterable[Any]) -> None:
        """Publish the pulse (maintenance only).

        Args:
            pulses: `store.QueuePulse` records or mappings of the same fields; `due_in_seconds` becomes a moment on
                this host's monotonic clock, so that a reader needs no idea of when it was written.
        """
        now = time.monotonic()
        entries = sorted((_pulse_entry(p, now) for p in pulses), key=lambda e: not e["ready"])
        data = orjson.dumps(entries)
        while len(data) > PULSE_BYTES:  # thousands of queues: the idle ones give way
            entries = entries[: len(entries) * 9 // 10]
            data = orjson.dumps(entries)
        self._put_block(self._pulse_at, len(data), data)
        self._pulse_ns = time.monotonic_ns()

    def pulse(self) -> dict[str, QueuePulse]:
        """The last pulse by queue name; empty before the first. Parsed once per pulse and process."""
        if self.words[self._pulse_at] != self._pulse_cache[0]:
            block = self._get_block(self._pulse_at, 1)
            if block and block[1]:
                with contextlib.suppress(orjson.JSONDecodeError):
                    self._pulse_cache = block[0], {e["queue_name"]: e for e in orjson.loads(block[1])}
        return self._pulse_cache[1]

    def pulse_age(self, now: float) -> float:
        """Seconds since the last pulse; infinite before the first."""
        return now - self._pulse_ns / 1e9 if self._pulse_ns else math.inf

    @property
    def cancels(self) -> list[tuple[UUID, UUID]]:
        """(job, claim token) of running jobs whose end was asked for; set by maintenance, read by workers."""
        block = self._get_block(self._cancels_at, 32)
        data = block[1] if block else b""
        return [
            (UUID(bytes=data[at : at + 16]), UUID(bytes=data[at + 16 : at + 32]))
            for at in range(0, len(data), 32)
        ]

    @cancels.setter
    def cancels(self, pairs: Sequence[tuple[UUID, UUID]]) -> None:
        kept = pairs[:CANCELS]  # the rest comes with the next pulse, when these are gone
        self._put_block(self._cancels_at, len(kept), b"".join(job.bytes + token.bytes for job, token in kept))

    def try_steal(self, pool_index: int, now: float, every: float = 1.0) -> bool:
        """May this pool steal now? True at most about once per `every` seconds (two at the same instant do no harm)."""
        cell = self._steals_at + pool_index % STEAL_CELLS
        if now - self.words[cell] / 1e9 < every:
            return False
        self.words[cell] = nanoseconds(now)
        return True

    def request_reoffer(self) -> None:
        """Ask the migrator to look for marked rows that are not in Redis."""
        self.reoffer_requests += 1
        self.ring(self.bell_migrator)


def _pulse_entry(pulse: Any, now: float) -> QueuePulse:
    get = pulse.__getitem__ if isinstance(pulse, Mapping) else lambda name: getattr(pulse, name)
    due = get("due_in_seconds")
    return QueuePulse(
        queue_name=get("queue_name"),
        ready=bool(get("ready")),
        served=bool(get("served")),
        due_at=None if due is None else now + float(due),
        oldest_ready_seconds=float(get("oldest_ready_seconds") or 0.0),
        old_marks=bool(get("old_marks")),
    )
