"""`size-…` and `snapshot`: pmqd's drain once more, beside a lot of other rows, queues or partitions, or under an old snapshot.

Each is measured in turn with the plain drain, so that their ratio is of one run.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from benchmarks.peers import slots
from benchmarks.peers.arena import TEXT_BYTES, Arena, private
from benchmarks.peers.field import pmqd
from benchmarks.watch import Watch
from benchmarks.works import drain
from benchmarks.works.work import Figures, Scale, Work, rate, running

READY_TIMES, SCHEDULED_TIMES, FINISHED_TIMES = 5, 5, 50
"""So many times the jobs of the drain: 1,000,000 ready, 1,000,000 scheduled, 10,000,000 finished."""
QUEUES = 50
FULL_MONTHS = 4
"""Months before this one that hold finished jobs: none is old enough for retention."""
EMPTY_MONTHS = 6
LOG_MONTHS = 3
"""Months of job_logs that are not old enough for retention either."""

_FINISHED: LiteralString = """
    insert into {month} (id, queue_name, priority, payload, status, ready, attempt_count, run_at, created_at, updated_at,
                         started_at, completed_at, claim_token, worker_id)
    select (lpad(to_hex(floor(extract(epoch from made) * 1000)::bigint), 12, '0') || '7' || substr(noise, 1, 3)
            || '8' || substr(noise, 4, 15))::uuid,
           'bench', 100, '{{}}', 'completed', false, 1, made, made, made + interval '1 s', made + interval '0.9 s',
           made + interval '1 s', noise::uuid, 'host:pid:worker'
    from (select n, {first} + (n * 27.0 / {rows}) * interval '1 day' as made, md5(n::text) as noise
          from generate_series(1, {rows}) n) n
"""


def measure(name: str, make: Callable[[Arena], None], scale: Scale, *, queues: int = 1) -> Figures:
    """The drain after something else was made."""
    contestant = pmqd(name, queues=queues)
    with private(scale.jobs_or(drain.MOST_JOBS)) as arena:
        contestant.fill(arena)
        make(arena)
        arena.settled()
        return drain.drained(contestant, arena)


def measure_ready(scale: Scale) -> Figures:
    """The rate over the first 200,000 starts of 1,000,000; the rest is given up."""
    jobs, contestant = scale.jobs_or(drain.MOST_JOBS), pmqd("pmqd-ready")
    with private(READY_TIMES * jobs) as arena:
        contestant.fill(arena)
        arena.settled()
        with running(contestant, arena) as workers:
            watch = Watch(arena, workers, 0, jobs)  # jobs are started in the order of their numbers
            watch.until_all()
            watch.close()
        starts = sorted(filter(None, slots.read(str(arena.slots), arena.jobs)[0]))
    return [("jobs/s", rate(starts[:jobs]))]


def measure_snapshot(scale: Scale) -> Figures:
    """The drain while somebody reads on in a state from before it."""
    contestant = pmqd("pmqd-snapshot")
    with private(scale.jobs_or(drain.MOST_JOBS)) as arena:
        contestant.fill(arena)
        arena.settled()
        with _snapshot(arena):
            figures = drain.drained(contestant, arena)
        starts = sorted(slots.read(str(arena.slots), arena.jobs)[0])
    tenth = max(2, len(starts) // 10)
    return [*figures, ("last tenth's rate / first tenth's", rate(starts[-tenth:]) / rate(starts[:tenth]))]


@contextmanager
def _snapshot(arena: Arena) -> Iterator[None]:
    with psycopg.connect(arena.dsn) as connection:
        connection.execute("set transaction isolation level repeatable read")
        connection.execute("select count(*) from pmqd.instances")
        yield


def _nothing(_arena: Arena) -> None:
    """The jobs are the difference."""


def _scheduled(arena: Arena) -> None:
    with arena.connect() as connection:
        connection.execute(
            "insert into pmqd.jobs (queue_name, payload, run_at)"
            " select 'bench', jsonb_build_object('number', n, 'text', repeat('x', %s)), now() + interval '7 days'"
            " from generate_series(1, %s::int) n",
            (TEXT_BYTES, SCHEDULED_TIMES * arena.jobs),
        )


def _months(arena: Arena, count: int) -> None:
    """Partitions of so many months before this one."""
    with arena.connect() as connection:
        for parent, months in (("jobs", count), ("job_logs", min(count, LOG_MONTHS))):
            for ago in range(1, months + 1):
                connection.execute(
                    "with m as (select (date_trunc('month', now() at time zone 'utc') - make_interval(months => %(ago)s))::date as m)"
                    " select pmqd.make_partition(%(parent)s, m), pmqd.attach_partition(%(parent)s, m) from m",
                    {"ago": ago, "parent": parent},
                )


def _finished(arena: Arena) -> None:
    """Completed jobs of months that are over; two sessions at a time, as there are two cores."""
    _months(arena, FULL_MONTHS)
    rows = FINISHED_TIMES * arena.jobs // FULL_MONTHS

    def fill(ago: int) -> None:
        with arena.connect() as connection:
            row: Any = connection.execute(
                "select m, 'jobs' || to_char(m, '_YYYY_MM') from"
                " (select date_trunc('month', now() at time zone 'utc') - make_interval(months => %s) as m) m",
                (ago,),
            ).fetchone()
            connection.execute("set timezone = 'UTC'")
            connection.execute(
                sql.SQL(_FINISHED).format(
                    month=sql.Identifier("pmqd", row[1]),
                    first=sql.SQL("{}::timestamptz").format(sql.Literal(f"{row[0]:%Y-%m-%d %H:%M}+00")),
                    rows=sql.Literal(rows),
                )
            )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(1, FULL_MONTHS + 1)))


def _work(name: str, about: str, measured: Callable[[Scale], Figures]) -> Work:
    """A work of two contestants: the plain drain, and the same with a difference."""
    variant = f"pmqd-{name.removeprefix('size-')}"
    return Work(
        name, f"the plain drain, and {about}", {"pmqd": partial(drain.measure, "pmqd"), variant: measured}
    )


SIZES = (
    _work(
        "size-ready",
        f"the first {drain.MOST_JOBS:,} starts of {READY_TIMES} times as many ready jobs",
        measure_ready,
    ),
    _work(
        "size-scheduled",
        f"the same with {SCHEDULED_TIMES} times as many jobs of the same queue that are due in a week",
        partial(measure, "pmqd-scheduled", _scheduled),
    ),
    _work(
        "size-finished",
        f"the same with {FINISHED_TIMES} times as many finished jobs in the last {FULL_MONTHS} months",
        partial(measure, "pmqd-finished", _finished),
    ),
    _work(
        "size-queues",
        f"the same jobs in {QUEUES} queues, all served by both workers",
        partial(measure, "pmqd-queues", _nothing, queues=QUEUES),
    ),
    _work(
        "size-partitions",
        f"the same with the empty partitions of {EMPTY_MONTHS} months before this one",
        partial(measure, "pmqd-partitions", partial(_months, count=EMPTY_MONTHS)),
    ),
    _work("snapshot", "the same while another session holds one snapshot from before it", measure_snapshot),
)
