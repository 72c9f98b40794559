"""The history of a run, as the checker reads it: one story per job, with all that anybody recorded of it.

Four sources are sorted by job and merged, so that a million jobs need no table in memory: the transitions (from
PostgreSQL, in COPY's binary form), the rows as they are in the end, and the lines of handlers and producers.
"""

import json
import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import UUID

import psycopg
from psycopg import sql

from pmqd.chaos import history

EPOCH_US: Final = 946_684_800_000_000
"""2000-01-01 in microseconds since 1970: COPY's binary form counts from there, and so does every time in here."""
NONE: Final = bytes(16)
"""No claim token."""

QUEUED, MARKED, RUNNING, COMPLETED, FAILED, CANCELLED, NOTHING = b"q", b"m", b"r", b"c", b"f", b"x", b"-"
NAMES: Final = {
    QUEUED: "queued", MARKED: "migrated_to_redis", RUNNING: "running", COMPLETED: "completed",
    FAILED: "failed", CANCELLED: "cancelled", NOTHING: "(none)",
}  # fmt: skip
TERMINAL: Final = frozenset({COMPLETED, FAILED, CANCELLED})


class Transition(NamedTuple):
    """One change of one row; times in microseconds since 2000 on the database's clock."""

    seq: int
    job: bytes
    at: int
    began: int
    run_at: int
    old: bytes
    new: bytes
    old_token: bytes
    new_token: bytes
    attempt: int
    interruptions: int
    max_attempts: int

    def __str__(self) -> str:
        """As a person reads it."""
        tokens = f"{_short(self.old_token)} -> {_short(self.new_token)}"
        return (
            f"T {self.seq} at {self.at} {NAMES[self.old]} -> {NAMES[self.new]} token {tokens} attempt {self.attempt}"
            f" of {self.max_attempts} interruptions {self.interruptions} run_at {self.run_at}"
        )


class Row(NamedTuple):
    """A row as it is in the end."""

    job: bytes
    status: bytes
    token: bytes
    attempt: int
    interruptions: int
    priority: int
    queue: str

    def __str__(self) -> str:
        """As a person reads it."""
        return f"row {self.queue} priority {self.priority}: {NAMES[self.status]} token {_short(self.token)} attempt {self.attempt}"


class Story(NamedTuple):
    """All that is known of one job."""

    job: bytes
    transitions: list[Transition]
    handlers: list[bytes]
    producers: list[bytes]
    row: Row | None

    def lines(self) -> list[str]:
        """Everything, for a person who wants to know what happened."""
        told = [line.decode(errors="replace") for line in (*self.producers, *self.handlers)]
        return [f"job {UUID(bytes=self.job)}", *map(str, self.transitions), *told, str(self.row or "no row")]


def _short(token: bytes) -> str:
    return token.hex()[:8] if token != NONE else "none"


# --- from PostgreSQL -----------------------------------------------------------------------------------------

_TRANSITIONS: Final = sql.SQL(
    """
    copy (
      select seq, job_id, at, began, run_at,
             (case old_status when 'cancelled' then 'x' else coalesce(left(old_status, 1), '-') end)::"char",
             (case new_status when 'cancelled' then 'x' else left(new_status, 1) end)::"char",
             coalesce(old_token, '00000000-0000-0000-0000-000000000000'), coalesce(new_token, '00000000-0000-0000-0000-000000000000'),
             attempt_count, interruptions, max_attempts
      from pmqd_chaos.transitions order by job_id, seq) to stdout (format binary)"""
)
_ROWS: Final = sql.SQL(
    """
    copy (
      select id, (case status when 'cancelled' then 'x' else left(status, 1) end)::"char",
             coalesce(claim_token, '00000000-0000-0000-0000-000000000000'), attempt_count, interruptions, priority, queue_name::text
      from {jobs} order by id) to stdout (format binary)"""
)
_SIGNATURE: Final = b"PGCOPY\n\xff\r\n\0"
_HEADER_BYTES: Final = 19
# Each field is preceded by its length, which is always the same: skipped.
_TRANSITION: Final = struct.Struct(">2x 4xq 4x16s 4xq 4xq 4xq 4xc 4xc 4x16s 4x16s 4xi 4xi 4xi")
_ROW: Final = struct.Struct(">2x 4x16s 4xc 4x16s 4xi 4xi 4xi 4x")


def transitions(connection: psycopg.Connection[Any]) -> Iterator[Transition]:
    """All transitions, by job and in their order."""
    unpack, size, make = _TRANSITION.unpack, _TRANSITION.size, Transition._make
    return (make(unpack(line)) for line in _copied(connection, _TRANSITIONS) if len(line) == size)


def rows(connection: psycopg.Connection[Any], schema: str) -> Iterator[Row]:
    """All jobs as they are now, by id."""
    query = _ROWS.format(jobs=sql.Identifier(schema, "jobs"))
    unpack, size = _ROW.unpack_from, _ROW.size
    names: dict[bytes, str] = {}
    for line in _copied(connection, query):
        queue = line[size:]
        job, status, token, attempt, interruptions, priority = unpack(line)
        name = names.setdefault(queue, queue.decode())
        yield Row(job, status, token, attempt, interruptions, priority, name)


def _copied(connection: psycopg.Connection[Any], query: sql.SQL | sql.Composed) -> Iterator[bytes]:
    """COPY's rows, one by one, without header and trailer."""
    with connection.cursor() as cursor, cursor.copy(query) as copy:
        for piece in copy:
            line = bytes(piece)
            if line.startswith(_SIGNATURE):
                line = line[_HEADER_BYTES:]
            if line and not line.startswith(b"\xff\xff"):
                yield line


# --- from files ----------------------------------------------------------------------------------------------


def lines_by_job(paths: Sequence[Path]) -> list[bytes]:
    """The lines of files whose second word is a job's id, sorted by it, else as they were written."""
    found: list[bytes] = []
    for path in paths:
        if path.exists():
            found += [line for line in path.read_bytes().split(b"\n") if len(line) > 38]
    found.sort(key=_job_of_line)
    return found


def _job_of_line(line: bytes) -> bytes:
    return line[2:38]


def stories(
    moved: Iterator[Transition], final: Iterator[Row], handlers: Sequence[bytes], producers: Sequence[bytes]
) -> Iterator[Story]:
    """Merges four sources that are each sorted by job.

    Args:
        moved: transitions.
        final: the rows as they are now.
        handlers: lines of handlers.
        producers: lines of producers.
    """
    change, row = next(moved, None), next(final, None)
    h = p = 0
    handlers_end, producers_end = len(handlers), len(producers)
    while True:
        candidates = [] if change is None else [change.job]
        if row is not None:
            candidates.append(row.job)
        if h < handlers_end:
            candidates.append(_raw(handlers[h][2:38]))
        if p < producers_end:
            candidates.append(_raw(producers[p][2:38]))
        if not candidates:
            return
        job = min(candidates)
        text = str(UUID(bytes=job)).encode()
        changes = []
        while change is not None and change.job == job:
            changes.append(change)
            change = next(moved, None)
        h, h_from = _past(handlers, h, text), h
        p, p_from = _past(producers, p, text), p
        mine, row = (row, next(final, None)) if row is not None and row.job == job else (None, row)
        yield Story(job, changes, list(handlers[h_from:h]), list(producers[p_from:p]), mine)


def _past(lines: Sequence[bytes], place: int, text: bytes) -> int:
    while place < len(lines) and lines[place][2:38] == text:
        place += 1
    return place


def _raw(text: bytes) -> bytes:
    try:
        return bytes.fromhex(text.replace(b"-", b"").decode())
    except ValueError:
        return NONE  # a line that nobody should have written: as the job of no number, an unknown one


# --- deaths and faults ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One fault that acted; monotonic microseconds."""

    name: str
    area: str
    began: int
    ended: int
    pids: tuple[int, ...] = ()
    stopped: bool = False


@dataclass
class Surroundings:
    """What happened around the jobs; times in monotonic microseconds.

    Attributes:
        deaths: pid -> when it was seen dead, sorted.
        masters: when masters died.
        faults: what the nemesis did.
        pauses: pid -> when it was stopped and went on.
        last_sign: pid -> the last line that its handlers wrote.
        drained: the number of the last transition when the wait for the end of all jobs was over.
    """

    deaths: dict[int, list[int]] = field(default_factory=dict)
    masters: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    pauses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    last_sign: dict[int, int] = field(default_factory=dict)
    drained: float = math.inf

    def death_after(self, pid: int, moment: int) -> int | None:
        """When the process that had this pid at that moment was seen dead."""
        times = self.deaths.get(pid, [])
        place = bisect_left(times, moment)
        return times[place] if place < len(times) else None

    def migrators_and_masters(self) -> int:
        """How many deaths may have cost the figure of deliveries something."""
        return len(self.masters) + sum("migrator" in fault.name for fault in self.faults)


def surroundings(folder: Path) -> Surroundings:
    """Reads `deaths`, `nemesis` and `drained` of a history."""
    found = Surroundings()
    for line in _lines(folder / history.DRAINED):
        found.drained = int(line)
    for line in _lines(folder / history.DEATHS):
        words = line.split()
        pid, moment = int(words[1]), int(words[2]) // 1000
        found.deaths.setdefault(pid, []).append(moment)
        if words[4:] == ["master"]:
            found.masters.append(moment)
    for times in found.deaths.values():
        times.sort()
    found.faults = _faults(folder / history.NEMESIS)
    for fault in found.faults:
        if fault.stopped:
            for pid in fault.pids:
                found.pauses.setdefault(pid, []).append((fault.began, fault.ended))
    return found


def _faults(path: Path) -> list[Fault]:
    begun: dict[tuple[str, str], dict[str, Any]] = {}
    found: list[Fault] = []
    last = 0
    for line in _lines(path):
        record = json.loads(line)
        key = (record["fault"], str(record.get("target", "")))
        last = max(last, record["at"])
        if record["phase"] == "begin":
            begun[key] = record
        else:
            found.append(_fault(begun.pop(key, record), record))
    return found + [_fault(record, {"at": last}) for record in begun.values()]


def _fault(begin: dict[str, Any], end: dict[str, Any]) -> Fault:
    details = [each["detail"] for each in (begin, end) if isinstance(each.get("detail"), dict)]
    return Fault(
        name=begin["fault"],
        area=next((str(detail["area"]) for detail in details if "area" in detail), ""),
        began=begin["at"] // 1000,
        ended=end["at"] // 1000,
        pids=tuple({int(pid) for detail in details for pid in detail.get("pids", ())}),
        stopped=any(detail.get("stopped") for detail in details),
    )


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


class Stretches:
    """Stretches of time, merged; for the question whether a moment lies in one, and what is left of a gap between them."""

    def __init__(self, found: Sequence[tuple[int, int]]) -> None:
        """Takes (from, to) in any order."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(found):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(start)
                self._ends.append(end)

    def __contains__(self, moment: object) -> bool:
        """Whether a moment lies in one of them."""
        assert isinstance(moment, int)
        place = bisect_right(self._starts, moment) - 1
        return place >= 0 and moment <= self._ends[place]

    def longest_outside(self, start: int, end: int) -> int:
        """The longest part of a stretch that none of these touches."""
        longest, at = 0, start
        for place in range(bisect_left(self._ends, start), len(self._starts)):
            if self._starts[place] >= end:
                break
            longest = max(longest, self._starts[place] - at)
            at = max(at, self._ends[place])
        return max(longest, end - at)
