"""Arrays packed by hand are what PostgreSQL reads."""

from uuid import UUID, uuid4

import psycopg

from pmqd.store_arrays import array, float_array, uuid_array


def test_packed_arrays_are_read_as_they_were(database: str) -> None:
    """Ids, floats to the last bit, nulls, words, and none at all."""
    ids = [uuid4(), UUID(int=0), UUID(int=2**128 - 1)]
    floats = [0.1, None, -1e-300, 1e300, 3]
    with psycopg.connect(database) as connection:
        row = connection.execute(
            "select %s::uuid[], %s::float8[], %s::text[], %s::int[]",
            [uuid_array(ids), float_array(floats), array(["a", "b"]), array([1, -2])],
        ).fetchone()
        none = connection.execute(
            "select %s::uuid[], %s::float8[], %s::text[]", [uuid_array([]), float_array([]), array([])]
        ).fetchone()
        assert row == (ids, floats, ["a", "b"], [1, -2])
        assert none == ([], [], [])
