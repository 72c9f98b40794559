"""Marking for lists of ids: what each room gets, where a mark begins, whom it does not wait for."""

from dataclasses import replace
from uuid import UUID

import psycopg
import pytest

from pmqd.store import MarkedList, Room
from tests.store_tools import QUEUE, Bench

HIGH, NORMAL, LOW = Room(QUEUE, 1, 50, 100), Room(QUEUE, 51, 150, 100), Room(QUEUE, 151, 32767, 100)


@pytest.fixture
def term(bench: Bench) -> int:
    """The term of the bench's store, which leads."""
    term = bench.store.lead()
    assert term is not None
    return term


def ids_of(marked: MarkedList) -> list[UUID]:
    """The ids of a list, in order."""
    return [UUID(text) for text in marked.ids.split(" ")]


def test_each_room_gets_its_own_in_order(bench: Bench, term: int) -> None:
    """One answer for each room that gets anything: ids in order, how many of each kind; paused and empty ones are not in it."""
    late, early = bench.insert(2, kind="send", priority=100), bench.insert(priority=60)
    high, other = bench.insert(priority=7, kind="send"), bench.insert(queue_name="other")
    bench.insert(queue_name="paused")
    bench.store.sync_queues({}, ["paused"])
    bench.connection.execute("update pmqd.job_queues set is_active = false where name = 'paused'")
    rooms = [replace(NORMAL, queue_name=name) for name in ("paused", "other", QUEUE)]
    found = bench.store.mark_ids(term, [HIGH, LOW, *rooms])
    assert {place: ids_of(marked) for place, marked in found.items()} == {
        0: high,
        3: other,
        4: [*early, *sorted(late)],
    }
    assert [dict(found[place].kinds) for place in (0, 3, 4)] == [{"send": 1}, {None: 1}, {None: 1, "send": 2}]
    assert [found[place].count for place in (0, 3, 4)] == [1, 1, 3]
    assert bench.count("pmqd.jobs where status = 'migrated_to_redis'") == 5
    assert bench.store.mark_ids(term, [HIGH, LOW, *rooms]) == {}


def test_a_batch_ends_where_it_is_full(bench: Bench, term: int) -> None:
    """At most so many in all: the rooms in their order, the one at the border in part, those behind it not at all."""
    bench.insert(5, priority=10)
    bench.insert(5, priority=100)
    bench.insert(5, priority=200)
    found = bench.store.mark_ids(term, [HIGH, replace(NORMAL, limit=4), LOW], most=7)
    assert {place: marked.count for place, marked in found.items()} == {0: 5, 1: 2}
    assert bench.count("pmqd.jobs where status = 'queued'") == 8


def test_a_mark_may_begin_behind_a_row(bench: Bench, term: int) -> None:
    """Behind the last one marked it finds the next, and whatever has a better priority; all else when that does not fill the room."""
    first, second, third = bench.insert(3), bench.insert(3, priority=101), bench.insert(2, priority=102)
    few = replace(NORMAL, limit=4)
    last = bench.store.mark_ids(term, [few])[0]
    assert ids_of(last) == [*sorted(first), min(second)]
    [better], [late] = bench.insert(priority=99), bench.insert(run_at="2020-01-01", priority=101)
    found = bench.store.mark_ids(term, [replace(few, limit=3, after=last.last)])[0]
    assert ids_of(found) == [better, *sorted(second)[1:]]
    found = bench.store.mark_ids(term, [replace(few, after=found.last)])[0]
    assert ids_of(found) == [late, *sorted(third)]


def test_a_mark_does_not_wait_for_a_locked_row(bench: Bench, term: int) -> None:
    """A row that somebody has locked is left out, and marked later from the head."""
    made = sorted(bench.insert(3))
    with psycopg.connect(bench.dsn) as somebody:
        somebody.execute("select from pmqd.jobs where id = %s for update", [made[0]])
        found = bench.store.mark_ids(term, [replace(NORMAL, limit=2)])[0]
        assert ids_of(found) == made[1:]
    assert ids_of(bench.store.mark_ids(term, [NORMAL])[0]) == made[:1]
