"""What grows with the backlog, and what must not: read from PostgreSQL's own counters, not from a clock."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from uuid import UUID

import pytest

from pmqd.job import Action, Claimed
from pmqd.store import Fate, Room
from tests.store_tools import QUEUE, Bench, open_bench, outcome

BACKLOG = 20_000
ROOMS = [Room(QUEUE, 1, 50, 20), Room(QUEUE, 51, 150, 20), Room(QUEUE, 151, 32767, 20)]


@pytest.fixture
def bench(database: str) -> Iterator[Bench]:
    """A store that leads, two months more than usual, and nobody who analyzes."""
    with open_bench(database) as bench:
        for month in ("2025-01-01", "2025-02-01"):
            for step in ("make_partition", "attach_partition"):
                bench.connection.execute(f"select pmqd.{step}('jobs', %s::date)", [month])
        for row in bench.connection.execute(PARTITIONS).fetchall():
            bench.connection.execute(f"alter table {row['name']} set (autovacuum_enabled = off)")
        term = bench.store.lead()
        assert term is not None
        bench.term = term
        yield bench


PARTITIONS = (
    "select inhrelid::regclass::text as name from pg_inherits where inhparent = 'pmqd.jobs'::regclass"
)


@dataclass(frozen=True)
class Reads:
    """Rows and scans of all partitions of `jobs` since the last look."""

    whole_table: int
    rows: int
    heap_only: float


def reads(bench: Bench) -> Reads:
    """Looks at the counters and sets them back."""
    for connection in (bench.store.connection, bench.connection):
        connection.execute("select pg_stat_force_next_flush()")
        connection.execute("select 1")
    row = bench.connection.execute(
        "select sum(seq_scan)::int as whole_table, coalesce(sum(idx_tup_fetch + seq_tup_read), 0)::int as rows,"
        " sum(n_tup_hot_upd) / greatest(sum(n_tup_upd), 1)::float8 as heap_only"
        " from pg_stat_user_tables where relid in (select inhrelid from pg_inherits where inhparent = 'pmqd.jobs'::regclass)"
    ).fetchone()
    assert row is not None
    bench.connection.execute("select pg_stat_reset()")
    return Reads(**row)


def fill(bench: Bench) -> None:
    """A backlog that is due, and as many jobs for tomorrow at a better priority."""
    bench.connection.execute(
        "insert into pmqd.jobs (queue_name, payload, priority, run_at)"
        " select 'mail', '{}', 60, now() + interval '1 day' + n * interval '1 ms' from generate_series(1, %s) n",
        [BACKLOG],
    )
    bench.insert(BACKLOG)


def mark(bench: Bench) -> list[UUID]:
    """Twenty rows of each band."""
    return [each.id for each in bench.store.mark(bench.term, ROOMS, full=False)]


def settle(bench: Bench, jobs: list[Claimed]) -> None:
    """All completed."""
    assert len(bench.store.settle([outcome(job, Action.COMPLETE) for job in jobs], [jobs[0].token])) == len(
        jobs
    )


def warm_up(bench: Bench) -> None:
    """Every statement ten times on nearly empty tables: its plan is generic now, and made for nothing."""
    for _ in range(10):
        bench.insert(2)
        settle(bench, bench.claim(mark(bench)))
        bench.insert(2)
        settle(bench, bench.steal(20))
        bench.claim(bench.insert(2))
        bench.store.rescue("host:12345678:w0.1", fates={}, default=Fate.UNSTARTED, cause="x")
        settle(bench, bench.steal(20))
        bench.store.beat(bench.instance_id, holding=True, stalled_tick=None)


@pytest.mark.parametrize("warm", [True, False], ids=["plans of an empty table", "fresh plans"])
def test_what_a_job_costs_does_not_grow_with_the_backlog(bench: Bench, warm: bool) -> None:
    """40,000 rows wait in tables that were never analyzed: each step reads about as many rows as it works on, none reads a table."""
    if warm:
        warm_up(bench)
    fill(bench)
    reads(bench)
    costs = {}
    for turn in range(8):
        ids = mark(bench)
        assert len(ids) == 20
        costs["mark", turn] = reads(bench)
        jobs = bench.claim(ids)
        costs["claim", turn] = reads(bench)
        settle(bench, jobs)
        costs["settle", turn] = reads(bench)
        jobs = bench.steal(20)
        costs["steal", turn] = reads(bench)
        bench.store.rescue("host:12345678:w0.1", fates={}, default=Fate.UNSTARTED, cause="x")
        costs["rescue", turn] = reads(bench)
        bench.store.beat(bench.instance_id, holding=True, stalled_tick=None)
        costs["beat", turn] = reads(bench)
        bench.store.marked(QUEUE, 51, 150)
        costs["marked", turn] = reads(bench)
    too_much = {step: cost for step, cost in costs.items() if cost.whole_table or cost.rows > 15_000}
    assert not too_much
    dear = {step: cost.rows for step, cost in costs.items() if step[0] != "marked" and cost.rows > 600}
    assert not dear


@pytest.mark.parametrize("warm", [True, False], ids=["plans of an empty table", "fresh plans"])
def test_a_mark_behind_a_row_does_not_read_what_stands_before_it(bench: Bench, warm: bool) -> None:
    """2,000 marked rows stand at the head: a mark that begins behind them reads only its own."""
    if warm:
        warm_up(bench)
    fill(bench)
    room = Room(QUEUE, 51, 150, 2000)
    last = bench.store.mark_ids(bench.term, [room])[0].last
    reads(bench)
    found = bench.store.mark_ids(bench.term, [replace(room, limit=20, after=last)])[0]
    cost = reads(bench)
    assert found.count == 20
    assert cost.whole_table == 0
    assert cost.rows < 200


def test_mark_and_settle_are_heap_only(bench: Bench) -> None:
    """Neither writes an index: with half a page free, nearly every version stays on its page."""
    fill(bench)
    reads(bench)
    ids = mark(bench)
    assert reads(bench).heap_only == 1.0
    jobs = bench.claim(ids)
    assert reads(bench).heap_only == 0.0
    settle(bench, jobs)
    assert reads(bench).heap_only == 1.0


@pytest.mark.parametrize("name", ["claim", "settle", "settle_completed"])
def test_a_generic_plan_touches_only_the_month_of_its_ids(bench: Bench, name: str) -> None:
    """Five partitions and the default: the ones without any of the ids are removed before the statement begins."""
    from uuid import uuid4

    from pmqd.store_rows import Settle, claim_parameters

    jobs = bench.claim(bench.insert(3))
    parameters = claim_parameters([job.id for job in jobs], uuid4(), "w", bench.instance_id)
    if name != "claim":
        action = Action.COMPLETE if name == "settle_completed" else Action.RETRY
        settle = Settle([outcome(job, action) for job in jobs], [])
        assert settle.query == name
        parameters = settle.parameters
    connection = bench.store.connection
    connection.execute("set plan_cache_mode = force_generic_plan")
    connection.prepare_threshold = 0
    query = b"explain (analyze, costs off, timing off) " + bench.store._queries[name]
    lines = [row[0] for row in connection.execute(query, parameters).fetchall()]
    scans = [line for line in lines if "Scan" in line and " on jobs_" in line]
    assert len(scans) == 1, "\n".join(lines)
    assert "Index Scan" in scans[0]
