"""Arrays packed by hand are what PostgreSQL reads."""

from datetime import UTC, datetime, timedelta, timezone
from uuid import UUID, uuid4

import psycopg

from pmqd.store_arrays import array, float_array, time_array, uuid_array


def test_packed_arrays_are_read_as_they_were(database: str) -> None:
    """Ids, times to the microsecond on both sides of PostgreSQL's year zero, nulls, floats to the last bit, words, and none at all."""
    ids = [uuid4(), UUID(int=0), UUID(int=2**128 - 1)]
    times = [
        datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),
        None,
        datetime(1999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2026, 1, 2, 3, 4, 5, 1, tzinfo=timezone(timedelta(hours=2))),
    ]
    floats = [0.1, -1e-300, 1e300, 3]
    with psycopg.connect(database) as connection:
        row = connection.execute(
            "select %s::uuid[], %s::timestamptz[], %s::float8[], %s::text[], %s::int[]",
            [uuid_array(ids), time_array(times), float_array(floats), array(["a", "b"]), array([1, -2])],
        ).fetchone()
        none = connection.execute(
            "select %s::uuid[], %s::timestamptz[], %s::float8[], %s::text[]",
            [uuid_array([]), time_array([]), float_array([]), array([])],
        ).fetchone()
        assert row == (ids, times, floats, ["a", "b"], [1, -2])
        assert none == ([], [], [], [])
