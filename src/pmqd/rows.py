"""Rows on their way into `jobs`: options checked, ids made, COPY lines written. No I/O."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
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
COPY_COLUMNS: Final = ("id", "queue_name", "kind", "priority", "payload", "max_attempts", "run_at", "tags")

_COPY_CHUNK: Final = 512
_TICKS_PER_MS: Final = 4096


@dataclass(frozen=True, slots=True)
class Row:
    """One job to be written. What is None is decided by the queue's defaults in the database."""

    id: UUID
    queue_name: str
    kind: str | None
    payload: bytes  # JSON text
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

    def make(self, count: int) -> list[UUID]:
        """That many ids, each greater than all before."""
        ticks = time.time_ns() * _TICKS_PER_MS // 1_000_000
        with self._lock:
            first = max(ticks, self._last + 1)
            self._last = first + count - 1
        noise = os.urandom(8 * count)
        return [
            uuid7(tick // _TICKS_PER_MS, tick % _TICKS_PER_MS, int.from_bytes(noise[at : at + 8]))
            for tick, at in zip(range(first, first + count), range(0, 8 * count, 8), strict=True)
        ]


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
        payload=checked_payload(payload),
        priority=_number("priority", options.get("priority"), LOWEST_PRIORITY, "; lower runs first"),
        run_at=_run_at(options.get("run_at")),
        max_attempts=_number("max_attempts", options.get("max_attempts"), MAX_ATTEMPTS_LIMIT, ""),
        tags=tags_of(tags) if tags else (),
        own_id=own_id is not None,
    )


def split_options(
    row: Mapping[str, Any], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of a row of `enqueue_many`, and its options over the defaults.

    Raises:
        EnqueueError: The row is no mapping, or has an option that does not exist.
    """
    if not isinstance(row, Mapping):
        raise EnqueueError(f"{shown(row)} is not allowed: a mapping of arguments is needed")
    arguments = dict(row)
    given = arguments.pop("_options", None) or {}
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


def copy_text(rows: Sequence[Row], defaults: Mapping[str, QueueDefaults], now: datetime) -> Iterator[str]:
    """The rows in COPY's text format, in pieces.

    Args:
        rows: What to write.
        defaults: Of the queues that have any.
        now: The database's time, from which a `run_at` that is a timedelta counts.
    """
    for start in range(0, len(rows), _COPY_CHUNK):
        yield "".join([_copy_line(row, defaults, now) for row in rows[start : start + _COPY_CHUNK]])


def _copy_line(row: Row, defaults: Mapping[str, QueueDefaults], now: datetime) -> str:
    queue = defaults.get(row.queue_name, _STANDARD)
    due = now if row.run_at is None else now + row.run_at if isinstance(row.run_at, timedelta) else row.run_at
    kind = "\\N" if row.kind is None else _escaped(row.kind)
    # A queue's name needs no escaping, its check allows nothing that COPY reads otherwise; and JSON text holds
    # neither tabs nor line ends, so only its backslashes do.
    payload = row.payload.decode().replace("\\", "\\\\")
    return (
        f"{row.id}\t{row.queue_name}\t{kind}\t{row.priority or queue.priority}\t{payload}\t"
        f"{row.max_attempts or queue.max_attempts}\t{due.isoformat()}\t{_array(row.tags)}\n"
    )


def _array(tags: tuple[str, ...]) -> str:
    if not tags:
        return "{}"
    quoted = ('"' + tag.replace("\\", "\\\\").replace('"', '\\"') + '"' for tag in tags)
    return _escaped("{" + ",".join(quoted) + "}")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


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
