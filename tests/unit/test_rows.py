"""Rows before they are written: options, ids, sizes, COPY's text."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import pytest

from pmqd.errors import EnqueueError
from pmqd.job import MAX_PAYLOAD_BYTES
from pmqd.rows import IdMaker, QueueDefaults, Row, by_copy, copy_text, payload_of, row_of, split_options

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


def test_copy_text_escapes_and_fills_in() -> None:
    """Backslashes are doubled, tags quoted, and what nobody said is the queue's or the standard's."""
    made = row_of(
        "mail", "a\\b\tc", rb'{"a":"x\ny\\"}', {"tags": ['q"\\'], "run_at": timedelta(seconds=1)}, ID
    )
    plain = row_of("other", None, b"1", {}, ID)
    text = "".join(copy_text([made, plain], {"mail": QueueDefaults(7, 9)}, NOW))
    due, tags = "2026-01-02T00:00:01+00:00", r'{"q\\"\\\\"}'
    assert text.split("\n") == [
        "\t".join([str(ID), "mail", r"a\\b\tc", "7", r'{"a":"x\\ny\\\\"}', "9", due, tags]),
        "\t".join([str(ID), "other", r"\N", "100", "1", "3", "2026-01-02T00:00:00+00:00", "{}"]),
        "",
    ]
