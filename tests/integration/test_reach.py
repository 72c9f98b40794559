"""Claims without hints, one after the other: where each begins, and that nothing is missed for it."""

from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import psycopg
import pytest

from pmqd.job import Claimed, moment
from pmqd.reach import FROM_HEAD_SECONDS, Reach
from pmqd.store import Best, Position
from pmqd.store_rows import stretches
from tests.jobs import a_claim
from tests.store_tools import QUEUE, Bench, best


def behind(job: Claimed, stretch: int = 1) -> tuple[int, Position]:
    """Where to begin to get what stands behind this one."""
    return stretch, Position(job.priority, moment(job.run_at).isoformat(), str(job.id))


def ids_of(jobs: list[Claimed]) -> list[UUID]:
    """Their ids."""
    return [job.id for job in jobs]


def test_a_steal_may_begin_behind_a_row(bench: Bench) -> None:
    """Behind the last one won it finds the next, and whatever has a better priority; all else when that does not fill it."""
    first, second, third = bench.insert(3), bench.insert(3, priority=101), bench.insert(2, priority=102)
    won = bench.steal(4)
    assert ids_of(won) == [*sorted(first), min(second)]
    [better], [late] = bench.insert(priority=99), bench.insert(run_at="2020-01-01", priority=101)
    won = bench.steal(3, after=behind(won[-1]))
    assert ids_of(won) == [better, *sorted(second)[1:]]
    won = bench.steal(4, after=behind(won[-1]))
    assert ids_of(won) == [late, *sorted(third)]


def test_a_steal_begins_behind_a_row_of_its_own_stretch_alone(bench: Bench) -> None:
    """The bands before it and behind it are looked at as a whole, and nothing is won twice when the stretch is looked at again."""
    low, normal = bench.insert(2, priority=200), bench.insert(3)
    [first] = bench.steal(1)
    [high] = bench.insert(priority=10)
    won = bench.steal(9, after=behind(first))
    assert ids_of(won) == [high, *sorted(normal)[1:], *sorted(low)]
    assert bench.count("pmqd.jobs where attempt_count = 1") == 6


def test_a_steal_does_not_wait_for_a_locked_row(bench: Bench) -> None:
    """A row that somebody has locked is left out, and won later from the head."""
    made = sorted(bench.insert(3))
    with psycopg.connect(bench.dsn) as somebody:
        somebody.execute("select from pmqd.jobs where id = %s for update", [made[0]])
        won = bench.steal(2)
        assert ids_of(won) == made[1:]
    assert ids_of(bench.steal(2, after=behind(won[-1]))) == made[:1]


def test_marked_rows_may_be_left_to_their_hints(bench: Bench) -> None:
    """From the head and behind a row; without Redis they are won like all others."""
    made = sorted(bench.insert(6))
    marked = [made[1], made[4]]
    bench.connection.execute("update pmqd.jobs set status = 'migrated_to_redis' where id = any(%s)", [marked])
    first = bench.steal(2, marked=False)
    assert ids_of(first) == [made[0], made[2]]
    assert ids_of(bench.steal(2, marked=False, after=behind(first[-1]))) == [made[3], made[5]]
    assert ids_of(bench.steal(9)) == marked


def test_a_queue_paused_behind_the_row_gives_nothing(bench: Bench) -> None:
    """Where to begin does not get past a pause."""
    bench.insert(3)
    [first] = bench.steal(1)
    bench.store.sync_queues({}, [QUEUE])
    bench.connection.execute("update pmqd.job_queues set is_active = false")
    assert bench.steal(9, after=behind(first)) == []


PLACES = stretches(["mail", "bulk"], "bands")
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


@pytest.mark.parametrize(
    ("queue", "priority", "place"), [("mail", 50, 0), ("bulk", 50, 1), ("mail", 51, 2), ("bulk", 32767, 5)]
)
def test_the_next_claim_begins_behind_the_last_row(queue: str, priority: int, place: int) -> None:
    """In the stretch of that row, with its time to the microsecond; from the head again after a while."""
    reach = Reach()
    wanted = reach.behind(Best(PLACES, 2), 100.0)
    assert wanted == Best(PLACES, 2)
    last = a_claim(id=UUID(int=7), queue_name=queue, priority=priority, run_at=NOW.timestamp())
    reach.won(wanted, [a_claim(), last])
    position = Position(priority, "2026-01-02T03:04:05.678901+00:00", str(UUID(int=7)))
    five = Best(PLACES, 5, marked=False)
    assert reach.behind(five, 100.0 + FROM_HEAD_SECONDS / 2) == replace(five, after=(place, position))
    assert reach.behind(five, 100.0 + FROM_HEAD_SECONDS) == five


def test_jobs_claimed_by_their_hints_do_not_fill_a_claim() -> None:
    """They come first in the answer, and some may have been somebody else's: only the others say how far the claim came."""
    reach, hinted = Reach(), [UUID(int=number) for number in (1, 2)]
    jobs = [a_claim(id=UUID(int=number)) for number in (2, 3, 4)]
    wanted = Best(PLACES, 2, hinted=hinted)
    reach.won(reach.behind(wanted, 100.0), jobs)
    assert reach.behind(Best(PLACES, 2), 100.1).after is not None
    reach.won(reach.behind(wanted, 100.1), jobs[:2])
    assert reach.behind(Best(PLACES, 2), 100.1).after is None


def test_a_claim_that_was_not_filled_leaves_nothing_to_begin_behind() -> None:
    """Then all stretches were looked at to their end."""
    reach = Reach()
    reach.won(reach.behind(Best(PLACES, 3), 100.0), [a_claim(), a_claim()])
    assert reach.behind(Best(PLACES, 3), 100.0).after is None


def test_a_stretch_that_is_not_looked_at_is_not_begun_behind() -> None:
    """Another order of queues has other stretches."""
    reach = Reach()
    reach.won(reach.behind(Best(PLACES, 1), 100.0), [a_claim(priority=7)])
    assert reach.behind(Best(stretches(["mail"], "queues"), 1), 100.0).after is None
    assert best(1).queues == [QUEUE]
