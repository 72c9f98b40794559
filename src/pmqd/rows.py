"""Rows on their way into `jobs`: options checked, ids made, COPY's binary form written. No I/O."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from struct import pack, unpack
from typing import Any, Final
from uuid import UUID

from pmqd import codec
from pmqd.errors import EnqueueError, shown
from pmqd.job import (
    DEFAULT_MAX_ATTEMPTS,
    DEFAULT_PRIORITY,
    LOWEST_PRIORITY,
    MAX_ATTEMPTS_LIMIT,
    MAX_KIND_LENGTH,
    MAX_PAYLOAD_BYTES,
    TOO_LARGE,
    check_queue_name,
    is_text,
    tags_of,
    uuid7,
)

ROW_OPTIONS: Final = ("priority", "run_at", "max_attempts", "tags", "id")
COPY_COLUMNS: Final = ("id", "payload", "queue_name", "kind", "priority", "max_attempts", "run_at", "tags")
"""In this order: what each row has of its own, then what many rows in a row have alike."""

_COPY_CHUNK: Final = 512
_COPY_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END: Final = b"\xff\xff"
_ROW_START: Final = pack(">hi", len(COPY_COLUMNS), 16)  # how many fields, and the length of the first, an id
_JSONB_VERSION: Final = b"\x01"
_NULL: Final = pack(">i", -1)
_TEXT_OID: Final = 25
_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)  # PostgreSQL's
_MICROSECOND: Final = timedelta(microseconds=1)
_TICKS_PER_MS: Final = 4096
_NOISE_AHEAD: Final = 128


@dataclass(slots=True)
class Row:
    """One job to be written. What is None is decided by the queue's defaults in the database.

    Made by the ten thousand, and never changed; not frozen, which would make it four times as slow to make.
    """

    id: UUID
    queue_name: str
    kind: str | None
    payload: str  # JSON; not the bytes that orjson gives, whose cut-off buffers cost more to keep than all else here
    priority: int | None
    run_at: datetime | timedelta | None
    max_attempts: int | None
    tags: tuple[str, ...]
    own_id: bool  # the caller chose the id, so it may exist already


@dataclass(frozen=True, slots=True)
class QueueDefaults:
    """What a queue's jobs get where nobody says it."""

    priority: int = DEFAULT_PRIORITY
    max_attempts: int = DEFAULT_MAX_ATTEMPTS


_STANDARD: Final = QueueDefaults()


class IdMaker:
    """Makes UUIDv7 that grow: the jobs of one process keep their order, even within one microsecond."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._noise: list[int] = []
        self._pid = 0

    def make(self, count: int) -> list[UUID]:
        """That many ids, each greater than all before."""
        ticks = time.time_ns() * _TICKS_PER_MS // 1_000_000
        with self._lock:
            first = max(ticks, self._last + 1)
            self._last = first + count - 1
            noise = self._random(count)
        return [
            uuid7(tick // _TICKS_PER_MS, tick % _TICKS_PER_MS, random_bits)
            for tick, random_bits in zip(range(first, first + count), noise, strict=True)
        ]

    def _random(self, count: int) -> list[int]:
        """Numbers from the kernel, which is asked for many at once: each time it is, another thread goes first."""
        if len(self._noise) < count or self._pid != os.getpid():  # a child does not use what its parent will
            asked = max(count, _NOISE_AHEAD)
            self._noise, self._pid = list(unpack(f"{asked}Q", os.urandom(8 * asked))), os.getpid()
        left = len(self._noise) - count
        taken = self._noise[left:]
        del self._noise[left:]
        return taken


def payload_of(value: Any) -> bytes:
    """The JSON text of a payload.

    Raises:
        EnqueueError: It has no JSON form, or is larger than 256 KiB.
    """
    if codec.is_surely_longer(value, MAX_PAYLOAD_BYTES):
        raise EnqueueError(TOO_LARGE)
    try:
        return checked_payload(codec.dumps(value))
    except (TypeError, ValueError) as error:
        if isinstance(error, EnqueueError):
            raise
        raise EnqueueError(f"payload: {error}") from None


def checked_payload(text: bytes) -> bytes:
    """The same text, if it is not too large.

    Raises:
        EnqueueError: It is larger than 256 KiB.
    """
    length = len(text)
    if length > MAX_PAYLOAD_BYTES // 2:
        length = _length_in_database(text)
    if length > MAX_PAYLOAD_BYTES:
        raise EnqueueError(
            f"payload of {length:,} bytes is not allowed: at most {MAX_PAYLOAD_BYTES:,} bytes of JSON; "
            "store what is large elsewhere and pass its key"
        )
    return text


def _length_in_database(text: bytes) -> int:
    """The length that PostgreSQL checks: its jsonb is printed with a blank after each comma and colon."""
    if len(text) > MAX_PAYLOAD_BYTES:
        return len(text)
    return len(json.dumps(codec.loads(text), ensure_ascii=False).encode())


def row_of(
    queue_name: str, kind: str | None, payload: bytes, options: Mapping[str, Any], new_id: UUID | None
) -> Row:
    """One row, its options checked.

    Args:
        queue_name: The queue.
        kind: The task's name, None for a whole-queue handler.
        payload: JSON text.
        options: `priority`, `run_at`, `max_attempts`, `tags`, `id`; None is as good as missing.
        new_id: The id of a row that brings none; None only where an own id is known to be there.

    Raises:
        EnqueueError: Names the option, the value and what is allowed.
    """
    check_queue_name(queue_name)
    _check_kind(kind)
    own_id = _id(options.get("id"))
    row_id = own_id or new_id
    assert row_id is not None, "a row needs an id"
    tags = options.get("tags")
    return Row(
        id=row_id,
        queue_name=queue_name,
        kind=kind,
        payload=checked_payload(payload).decode(),
        priority=_number("priority", options.get("priority"), LOWEST_PRIORITY, "; lower runs first"),
        run_at=_run_at(options.get("run_at")),
        max_attempts=_number("max_attempts", options.get("max_attempts"), MAX_ATTEMPTS_LIMIT, ""),
        tags=tags_of(tags) if tags else (),
        own_id=own_id is not None,
    )


def row_like(pattern: Row, payload: bytes, new_id: UUID) -> Row:
    """A row with a payload and an id of its own, and all else as in another one, which was checked."""
    return Row(
        new_id,
        pattern.queue_name,
        pattern.kind,
        checked_payload(payload).decode(),
        pattern.priority,
        pattern.run_at,
        pattern.max_attempts,
        pattern.tags,
        own_id=False,
    )


def split_options(
    row: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The arguments of a row of `enqueue_many`, and its options over the defaults; the defaults themselves where it has none.

    Raises:
        EnqueueError: The row is no mapping, or has an option that does not exist.
    """
    if not isinstance(row, Mapping):
        raise EnqueueError(f"{shown(row)} is not allowed: a mapping of arguments is needed")
    if "_options" not in row:
        return row if isinstance(row, dict) else dict(row), defaults
    arguments = dict(row)
    given = arguments.pop("_options") or {}
    if not isinstance(given, Mapping):
        raise EnqueueError(f"_options={shown(given)} is not allowed: a mapping of options is needed")
    for name in given:
        if name not in ROW_OPTIONS:
            raise EnqueueError(f"_options {name!r} is not allowed: {', '.join(ROW_OPTIONS)}")
    return arguments, {**defaults, **{name: value for name, value in given.items() if value is not None}}


def by_copy(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows for COPY, and rows that may exist already: those go by an insert that leaves existing ones alone."""
    new = [row for row in rows if not row.own_id]
    return (list(rows), []) if len(new) == len(rows) else (new, [row for row in rows if row.own_id])


def copy_data(
    rows: Sequence[Row], defaults: Mapping[str, QueueDefaults], now: datetime, encoding: str
) -> Iterator[bytes]:
    """The rows in COPY's binary format, in pieces.

    Args:
        rows: What to write.
        defaults: Of the queues that have any.
        now: The database's time, from which a `run_at` that is a timedelta counts.
        encoding: Python's name of the connection's encoding, in which PostgreSQL reads texts and JSON.
    """
    yield _COPY_HEADER
    last: tuple[Any, ...] = ()
    rest = b""
    for start in range(0, len(rows), _COPY_CHUNK):
        parts: list[bytes] = []
        for row in rows[start : start + _COPY_CHUNK]:
            alike = (row.queue_name, row.kind, row.priority, row.max_attempts, row.run_at, row.tags)
            if alike != last:
                last, rest = alike, _rest_of(row, defaults.get(row.queue_name, _STANDARD), now, encoding)
            payload = row.payload.encode(encoding)
            size = (len(payload) + 1).to_bytes(4)
            parts += (_ROW_START, row.id.int.to_bytes(16), size, _JSONB_VERSION, payload, rest)
        yield b"".join(parts)
    yield _COPY_END


def _rest_of(row: Row, queue: QueueDefaults, now: datetime, encoding: str) -> bytes:
    """The fields behind the payload."""
    due = now if row.run_at is None else now + row.run_at if isinstance(row.run_at, timedelta) else row.run_at
    numbers = (row.priority or queue.priority, row.max_attempts or queue.max_attempts)
    return b"".join(
        (
            _text(row.queue_name, encoding),
            _NULL if row.kind is None else _text(row.kind, encoding),
            *(pack(">ii", 4, number) for number in numbers),
            pack(">iq", 8, (due - _EPOCH) // _MICROSECOND),
            _array(row.tags, encoding),
        )
    )


def _text(value: str, encoding: str) -> bytes:
    written = value.encode(encoding)
    return pack(">i", len(written)) + written


def _array(tags: tuple[str, ...], encoding: str) -> bytes:
    if not tags:
        return pack(">iiii", 12, 0, 0, _TEXT_OID)
    items = b"".join(_text(tag, encoding) for tag in tags)
    return pack(">iiiiii", 20 + len(items), 1, 0, _TEXT_OID, len(tags), 1) + items


def _check_kind(kind: Any) -> None:
    if kind is None or (isinstance(kind, str) and 0 < len(kind) <= MAX_KIND_LENGTH and is_text(kind)):
        return
    raise EnqueueError(
        f"kind={shown(kind)} is not allowed: 1 to {MAX_KIND_LENGTH} characters of text without NUL, or None"
    )


def _number(name: str, value: object, most: int, note: str) -> int | None:
    if value is None or (type(value) is int and 1 <= value <= most):
        return value
    raise EnqueueError(f"{name}={shown(value)} is not allowed: a whole number from 1 to {most}{note}")


def _run_at(value: object) -> datetime | timedelta | None:
    if value is None or (isinstance(value, timedelta) and value >= timedelta(0)):
        return value
    if isinstance(value, datetime) and value.tzinfo is not None and value.utcoffset() is not None:
        return value
    raise EnqueueError(
        f"run_at={shown(value)} is not allowed: a datetime with its time zone, or a timedelta from 0"
    )


def _id(value: object) -> UUID | None:
    if value is None or isinstance(value, UUID):
        return value
    if isinstance(value, str):
        try:
            return UUID(value)
        except ValueError:
            pass
    raise EnqueueError(f"id={shown(value)} is not allowed: a UUID")
