"""Outcomes that PostgreSQL has not acknowledged, noted in the arena: work that is done does not run again because its process dies.

A note is written the moment a handler has ended, while the job's entry still stands, and is released when its outcome
is settled and counted. What stands here when the worker is dead, maintenance settles in its name. A note counts once
its word in the directory is written, last of all: a process killed in the middle of noting has noted nothing.

Places of three sizes, the lowest free one first, so that a quiet worker touches a few pages of all this. A text that
finds no place is cut, where it is an error, or left out, where it is a result; then the job is only known to be done
with nobody knowing how, and is interrupted as if it had run.

The journal makes a count happen exactly once: what the metric files are about to hold is written down here first, with
the notes that it is about. Whoever comes after a death in the middle writes the same figures once more.
"""

from __future__ import annotations

import mmap
import struct
import threading
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Final, NamedTuple
from uuid import UUID

from pmqd.job import Action, Outcome
from pmqd.record import WORD, Record

PLACES: Final = ((2048, 256), (192, 4096), (4, 264 * 1024))
"""How many places of how many bytes: the first for nearly all, the last for the largest result that is stored."""
NOTES: Final = sum(count for count, _ in PLACES)
JOURNAL_BYTES: Final = 96 * 1024

_HEAD: Final = struct.Struct("<16s16sBBHidddHHII")
_JOURNAL_HEAD: Final = struct.Struct("<qq")
_ACTIONS: Final = tuple(Action)
_NUMBER_OF: Final = {action: number for number, action in enumerate(_ACTIONS)}
_NEVER: Final = float("-inf")
_FAR_SECONDS: Final = 1e11
"""From 1970: no job starts there, and every client can still read the year."""
_NO_KIND: Final = 0xFFFF
_NO_TEXT: Final = 0xFFFFFFFF
_SMALL: Final = PLACES[0][1]
_making = threading.Lock()


class Sort(IntEnum):
    """What a note says."""

    WHOLE = 0  # the outcome, as it is to be settled
    DOUBTFUL = 1  # the handler settles it in its own transaction: true only if PostgreSQL says so
    PARTIAL = 2  # the job is done, but its result found no place


class Note(NamedTuple):
    """One outcome that was not acknowledged, and its place."""

    place: int
    sort: Sort
    outcome: Outcome


class Notes(Record):
    """One worker's notes. Its threads write them, each its own; maintenance reads when they are dead."""

    def __init__(self, memory: mmap.mmap, words: memoryview[int], base: int, data: int) -> None:
        """Takes the mapping, where the directory begins (words) and where the places do (bytes)."""
        super().__init__(memory, words, base)
        self._starts = _starts(data)
        self._free: list[list[int]] = []  # made by the process that writes, when it first does
        self._small: list[int] = []  # the first of them

    @staticmethod
    def data_bytes() -> int:
        """Bytes that the places of one worker take."""
        return sum(count * size for count, size in PLACES)

    def clear(self) -> None:
        """Forgets all: for the master, before the fork."""
        start = self.base * WORD
        self.memory[start : start + NOTES * WORD] = bytes(NOTES * WORD)
        self._free, self._small = [], []

    def put(self, outcome: Outcome, sort: Sort = Sort.WHOLE) -> int:
        """Notes an outcome; returns its place, or -1 where there is none. Any thread may call it."""
        if outcome.error is None and outcome.result is None:
            place = self._put_plain(outcome, sort)
            if place >= 0:
                return place
        data = _encoded(outcome, sort)
        place = self._take(len(data))
        if place < 0:
            data, place = self._shortened(outcome, sort)
            if place < 0:
                return -1
        start = self._starts[place]
        self.memory[start : start + len(data)] = data
        self.words[self.base + place] = len(data)
        return place

    def _put_plain(self, outcome: Outcome, sort: Sort) -> int:
        """As `put`, without texts of its own, straight into a small place; -1 where none is free or it is too long."""
        text, queue_size, kind_size = _names(outcome.queue_name, outcome.kind)
        size = _HEAD.size + len(text)
        if size > _SMALL or not self._small:  # (or the first note of this process)
            return -1
        try:
            place = self._small.pop()
        except IndexError:  # another thread has taken the last one
            return -1
        start = self._starts[place]
        started = outcome.started
        _HEAD.pack_into(
            self.memory,
            start,
            outcome.job_id.int.to_bytes(16, "big"),  # `bytes` is a property: a call more
            outcome.token.int.to_bytes(16, "big"),
            _NUMBER_OF[outcome.action],
            sort,
            queue_size,
            outcome.attempt_number,
            _NEVER if started is None else started,
            outcome.duration_seconds,
            outcome.delay_seconds,
            kind_size,
            0,
            _NO_TEXT,
            _NO_TEXT,
        )
        self.memory[start + _HEAD.size : start + size] = text
        self.words[self.base + place] = size
        return place

    def release(self, places: Sequence[int]) -> None:
        """These outcomes are settled and counted."""
        for place in places:
            if 0 <= place < NOTES:  # else a job has written over the journal that named it
                self.words[self.base + place] = 0
        if self._free:  # a reader has taken no place and gives none
            for place in places:
                self._free[_class_of(place)].append(place)

    def all(self, worker_id: str) -> list[Note]:
        """What is noted, in the order of the places."""
        lengths = self.words[self.base : self.base + NOTES].tolist()
        found = (self._read(place, length, worker_id) for place, length in enumerate(lengths) if length)
        return [note for note in found if note is not None]

    def _take(self, length: int) -> int:
        with _making:
            if not self._free:
                self._free = _all_free()
                self._small = self._free[0]
        for (_, size), free in zip(PLACES, self._free, strict=True):
            if length <= size:
                try:
                    return free.pop()
                except IndexError:
                    continue
        return -1

    def _shortened(self, outcome: Outcome, sort: Sort) -> tuple[bytes, int]:
        """Without its result, or with as much of its error as finds a place."""
        if outcome.result is not None:
            sort = Sort.PARTIAL if sort == Sort.WHOLE else sort
        for _, size in reversed(PLACES[:2]):
            data = _encoded(outcome, sort, room=size)
            if len(data) <= size and (place := self._take(len(data))) >= 0:
                return data, place
        return b"", -1

    def _read(self, place: int, length: int, worker_id: str) -> Note | None:
        """One note; None where a job has written over it, for nothing keeps it from that."""
        start = self._starts[place]
        if not 0 < length <= PLACES[_class_of(place)][1]:
            return None
        try:
            note = _decoded(place, self.memory[start : start + length], worker_id)
        except (struct.error, ValueError, IndexError, OverflowError):
            return None
        texts = (note.outcome.queue_name, note.outcome.kind or "", note.outcome.error or "")
        return None if any("\0" in text for text in texts) else note


def _all_free() -> list[list[int]]:
    """The places of each size, the lowest last, so that it is taken first."""
    free, first = [], 0
    for count, _ in PLACES:
        free.append(list(range(first + count - 1, first - 1, -1)))
        first += count
    return free


def _class_of(place: int) -> int:
    return 0 if place < PLACES[0][0] else 1 if place < PLACES[0][0] + PLACES[1][0] else 2


def _starts(data: int) -> list[int]:
    starts: list[int] = []
    for count, size in PLACES:
        starts += range(data, data + count * size, size)
        data += count * size
    return starts


def _encoded(outcome: Outcome, sort: Sort, room: int | None = None) -> bytes:
    """An outcome as bytes; with `room` the result is left out and the error cut so that they may fit."""
    names, queue_size, kind_size = _names(outcome.queue_name, outcome.kind)
    error = b"" if outcome.error is None else outcome.error.encode()
    result = outcome.result or b""
    if room is not None:
        result = b""
        error = error[: max(0, room - _HEAD.size - len(names))].decode("utf-8", "ignore").encode()
    head = _HEAD.pack(
        outcome.job_id.bytes,
        outcome.token.bytes,
        _NUMBER_OF[outcome.action],
        sort,
        queue_size,
        outcome.attempt_number,
        _NEVER if outcome.started is None else outcome.started,
        outcome.duration_seconds,
        outcome.delay_seconds,
        kind_size,
        0,
        _NO_TEXT if outcome.error is None else len(error),
        _NO_TEXT if outcome.result is None else len(result),
    )
    return b"".join((head, names, error, result))


@lru_cache(maxsize=1024)
def _names(queue_name: str, kind: str | None) -> tuple[bytes, int, int]:
    """Queue and kind as a note has them, and how long each is."""
    queue, rest = queue_name.encode(), b"" if kind is None else kind.encode()
    return queue + rest, len(queue), _NO_KIND if kind is None else len(rest)


def _decoded(place: int, data: bytes, worker_id: str) -> Note:
    (
        job_id, token, action, sort, queue_size, attempt, started, duration, delay, kind_size, _, error_size, result_size
    ) = _HEAD.unpack_from(data)  # fmt: skip
    if started != _NEVER and not abs(started) < _FAR_SECONDS:
        raise ValueError(f"{started} is no time")
    texts = []
    at = _HEAD.size
    for size in (queue_size, kind_size % _NO_KIND, error_size % _NO_TEXT, result_size % _NO_TEXT):
        texts.append(data[at : at + size])
        at += size
    queue, kind, error, result = texts
    outcome = Outcome(
        job_id=UUID(bytes=job_id),
        token=UUID(bytes=token),
        action=_ACTIONS[action],
        attempt_number=attempt,
        queue_name=queue.decode(),
        kind=None if kind_size == _NO_KIND else kind.decode(),
        worker_id=worker_id,
        result=None if result_size == _NO_TEXT else result,
        error=None if error_size == _NO_TEXT else error.decode(),
        delay_seconds=delay,
        started=None if started == _NEVER else started,
        duration_seconds=duration,
    )
    return Note(place, Sort(sort), outcome)


class Stage(IntEnum):
    """How far a count has come."""

    NONE = 0
    WRITTEN = 1  # the figures stand in the journal, perhaps in the files too
    COUNTED = 2  # the files hold them; what is to follow may not have been done


@dataclass(frozen=True, slots=True)
class Pending:
    """A count that somebody has begun.

    Attributes:
        stage: how far it has come.
        changes: what the files are to hold, as `pmqd.books` writes it.
        rest: what is to follow, as its writer has it.
    """

    stage: Stage
    changes: bytes
    rest: bytes


class Journal(Record):
    """What is being counted at this moment: one count at a time, by one process."""

    words_needed: Final = 1 + (JOURNAL_BYTES + _JOURNAL_HEAD.size) // WORD

    def begin(self, changes: bytes, rest: bytes) -> None:
        """Writes down what the files are about to hold; from here on it will be so, whatever dies.

        Raises:
            ValueError: It does not fit; nothing is written.
        """
        if len(changes) + len(rest) > JOURNAL_BYTES:
            raise ValueError(f"{len(changes) + len(rest)} bytes for a journal of {JOURNAL_BYTES}")
        data = _JOURNAL_HEAD.pack(len(changes), len(rest)) + changes + rest
        start = (self.base + 1) * WORD
        self.memory[start : start + len(data)] = data
        self.words[self.base] = Stage.WRITTEN

    def counted(self) -> None:
        """The files hold it."""
        self.words[self.base] = Stage.COUNTED

    def end(self) -> None:
        """What was to follow is done."""
        self.words[self.base] = Stage.NONE

    def pending(self) -> Pending | None:
        """A count that was not ended."""
        if self.words[self.base] not in (Stage.WRITTEN, Stage.COUNTED):
            return None
        stage = Stage(self.words[self.base])
        start = (self.base + 1) * WORD
        changes, rest = _JOURNAL_HEAD.unpack_from(self.memory, start)
        if not (0 <= changes <= JOURNAL_BYTES and 0 <= rest <= JOURNAL_BYTES - changes):
            return None  # a job has written over it
        start += _JOURNAL_HEAD.size
        middle = start + changes
        return Pending(stage, self.memory[start:middle], self.memory[middle : middle + rest])


def packed_places(places: Sequence[int]) -> bytes:
    """The places of notes, for a journal."""
    return array("q", places).tobytes()


def unpacked_places(data: bytes) -> list[int]:
    """As `packed_places` packed them."""
    return array("q", data[: len(data) // WORD * WORD]).tolist()
