"""Rows before they are written: options, ids, sizes, COPY's text."""

import os
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from struct import pack
from typing import Any
from uuid import UUID

import pytest

from pmqd.errors import EnqueueError
from pmqd.job import MAX_PAYLOAD_BYTES
from pmqd.rows import (
    IdMaker,
    QueueDefaults,
    Row,
    by_copy,
    copy_data,
    payload_of,
    row_like,
    row_of,
    split_options,
)

NOW = datetime(2026, 1, 2, tzinfo=UTC)
ID = UUID("0190b3f0-0000-7000-8000-000000000001")


def row(**options: Any) -> Row:
    """A row with these options."""
    return row_of("mail", "send", b"{}", options, ID)


def test_ids_grow_over_calls_and_within_one() -> None:
    """A hundred thousand ids in a row are version 7, different and in order."""
    maker = IdMaker()
    ids = maker.make(1) + maker.make(100_000) + maker.make(1)
    assert all(a < b for a, b in pairwise(ids))
    assert all(made.version == 7 for made in ids[:100])


def test_a_child_has_random_numbers_of_its_own() -> None:
    """What a process has asked of the kernel ahead is not used by its fork as well."""
    maker = IdMaker()
    maker.make(1)
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(here, maker.make(1)[0].bytes)
        os._exit(0)
    made = maker.make(1)[0].bytes
    assert os.read(there, 16)[8:] != made[8:]
    assert os.waitpid(child, 0)[1] == 0
    os.close(there)
    os.close(here)


def test_options_are_taken() -> None:
    """What fits is kept as it is; an id may be text."""
    made = row(priority=1, run_at=NOW, max_attempts=1000, tags=["a"], id=str(ID))
    assert (made.priority, made.run_at, made.max_attempts, made.tags, made.id, made.own_id) == (
        1,
        NOW,
        1000,
        ("a",),
        ID,
        True,
    )
    assert row().own_id is False
    assert row(run_at=timedelta(seconds=5)).run_at == timedelta(seconds=5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"priority": 0}, r"priority=0 is not allowed: a whole number from 1 to 32767; lower runs first"),
        ({"priority": True}, "priority=True"),
        ({"priority": "5"}, "priority='5'"),
        ({"max_attempts": 1001}, r"max_attempts=1001 is not allowed: a whole number from 1 to 1000"),
        ({"run_at": datetime(2026, 1, 2)}, "run_at=.* is not allowed: a datetime with its time zone"),  # noqa: DTZ001
        ({"run_at": "2026-01-02"}, "run_at='2026-01-02'"),
        ({"run_at": timedelta(seconds=-1)}, "run_at="),
        ({"tags": "one"}, "tags='one' is not allowed: a list of texts"),
        ({"id": "x"}, "id='x' is not allowed: a UUID"),
        ({"id": 7}, "id=7 is not allowed: a UUID"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], text: str) -> None:
    """Each wrong option is an error with its name, its value and what is allowed."""
    with pytest.raises(EnqueueError, match=text):
        row(**options)


@pytest.mark.parametrize("kind", ["", "a\0", "\ud800", 7, "x" * 201])
def test_kinds_that_do_not_fit(kind: Any) -> None:
    """A kind is a text of bounded length."""
    with pytest.raises(EnqueueError, match="kind="):
        row_of("mail", kind, b"{}", {}, ID)


def test_the_largest_payload_and_one_byte_more() -> None:
    """256 KiB as PostgreSQL prints jsonb are allowed, and nothing above, whichever way it is written."""
    assert len(payload_of("x" * (MAX_PAYLOAD_BYTES - 2))) == MAX_PAYLOAD_BYTES
    for value in ("x" * (MAX_PAYLOAD_BYTES - 1), [0] * 100_000, {"a": "é" * 140_000}):
        with pytest.raises(EnqueueError, match=r"at most 262,144 bytes of JSON"):
            payload_of(value)


def test_a_payload_without_a_form() -> None:
    """The error names where in the payload it is."""
    with pytest.raises(EnqueueError, match=r"payload: \$\.a: a value of type object"):
        payload_of({"a": object()})


def test_options_of_a_row_of_many() -> None:
    """Options stand apart, over the task's own; the caller's mapping is left as it was."""
    given = {"a": 1, "_options": {"priority": 5, "tags": None}}
    assert split_options(given, {"priority": 7, "max_attempts": 2}) == (
        {"a": 1},
        {"priority": 5, "max_attempts": 2},
    )
    assert "_options" in given


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"_options": {"colour": 1}}, r"_options 'colour' is not allowed: priority, run_at"),
        ({"_options": 7}, "_options=7"),
        ([1], "a mapping of arguments is needed"),
    ],
)
def test_rows_that_are_none(given: Any, text: str) -> None:
    """What is no row of arguments, or has an unknown option, is an error."""
    with pytest.raises(EnqueueError, match=text):
        split_options(given, {})


def test_rows_with_own_ids_go_another_way() -> None:
    """Only rows that may exist already are kept from COPY."""
    new, own = row(), row(id=ID)
    assert by_copy([new, new]) == ([new, new], [])
    assert by_copy([new, own]) == ([new], [own])


def test_a_row_like_another() -> None:
    """Id and payload are its own, and the payload is measured; all else is as it was checked once."""
    pattern = row_of("mail", "send", b"{}", {"priority": 7, "max_attempts": 2}, ID)
    other = UUID(int=9)
    assert row_like(pattern, b'{"a":1}', other) == row_of(
        "mail", "send", b'{"a":1}', {"priority": 7, "max_attempts": 2}, other
    )
    with pytest.raises(EnqueueError, match=r"at most 262,144 bytes of JSON"):
        row_like(pattern, b'"' + b"x" * MAX_PAYLOAD_BYTES + b'"', other)


def fields(data: bytes) -> list[list[bytes | None]]:
    """COPY's binary rows, field by field."""
    head, found = 19, []
    assert data[:head] == b"PGCOPY\n\xff\r\n\0" + bytes(8)
    while (count := int.from_bytes(data[head : head + 2])) != 0xFFFF:
        head += 2
        row: list[bytes | None] = []
        for _ in range(count):
            length = int.from_bytes(data[head : head + 4], signed=True)
            head += 4
            row.append(None if length < 0 else data[head : head + length])
            head += max(length, 0)
        found.append(row)
    assert head + 2 == len(data)
    return found


def test_copys_data_is_filled_in() -> None:
    """What nobody said is the queue's or the standard's, texts are in the connection's encoding, a missing kind is null."""
    options = {"tags": ["ü", ""], "run_at": timedelta(seconds=1)}
    made = row_of("mail", "ünd", '{"a":"ü"}'.encode(), options, ID)
    plain = row_of("other", None, b"1", {}, ID)
    one, other = fields(b"".join(copy_data([made, plain], {"mail": QueueDefaults(7, 9)}, NOW, "iso8859-1")))
    due = (NOW - datetime(2000, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    tags = pack(">5i", 1, 0, 25, 2, 1) + pack(">i", 1) + b"\xfc" + pack(">i", 0)
    assert one[:4] == [ID.bytes, b'\x01{"a":"\xfc"}', b"mail", b"\xfcnd"]
    assert one[4:] == [pack(">i", 7), pack(">i", 9), pack(">q", due + 1_000_000), tags]
    assert other[:4] == [ID.bytes, b"\x011", b"other", None]
    assert other[4:] == [pack(">i", 100), pack(">i", 3), pack(">q", due), pack(">iii", 0, 0, 25)]


def test_copys_data_in_pieces() -> None:
    """More rows than go into one piece, alike and not, each with its own id and options."""
    ids = IdMaker().make(2000)
    made = [row_of("mail", "send", b"{}", {"priority": 1 + n // 700}, new_id) for n, new_id in enumerate(ids)]
    pieces = list(copy_data(made, {}, NOW, "utf-8"))
    assert len(pieces) > 3
    found = fields(b"".join(pieces))
    assert [row[0] for row in found] == [new_id.bytes for new_id in ids]
    assert [row[4] for row in found] == [pack(">i", 1 + n // 700) for n in range(2000)]
