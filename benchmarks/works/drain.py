"""`drain`: jobs that do nothing, enqueued before the workers start."""

import time
from functools import partial

from benchmarks.peers import slots
from benchmarks.peers.arena import Arena, Failure, private
from benchmarks.peers.field import FIELD, Contestant
from benchmarks.usage import Usage, used
from benchmarks.watch import Watch
from benchmarks.works.work import Figures, Scale, Work, rate, running

JOBS = {"celery": 20_000, "dramatiq": 20_000, "bullmq": 20_000, "pgqueuer": 20_000, "procrastinate": 6_000}
MOST_JOBS = 200_000
DONE_SECONDS = 60.0


def measure(name: str, scale: Scale) -> Figures:
    """One contestant's rate from its first to its last start, and until all is durably done."""
    contestant = FIELD[name]
    with private(scale.jobs_or(JOBS.get(name, MOST_JOBS))) as arena:
        contestant.fill(arena)
        arena.settled()
        return drained(contestant, arena, costs=True)


def drained(contestant: Contestant, arena: Arena, *, costs: bool = False) -> Figures:
    """Starts the workers and waits until all jobs are done; if wanted, also tells what each job cost."""
    with running(contestant, arena) as workers:
        watch = Watch(arena, workers)
        watch.until_first()
        before, seen = used(arena, workers), watch.count()
        watch.until_all()
        done = _durably_done(contestant, arena) if contestant.done else 0
        usage = used(arena, workers) - before
        watch.close()
        check(contestant, arena)
    starts = sorted(slots.read(str(arena.slots), arena.jobs)[0])
    figures = [("jobs/s", rate(starts))]
    if done:
        figures.append(("jobs/s until durably done", arena.jobs / ((done - starts[0]) / 1e9)))
    return [*figures, *_costs(usage, arena.jobs - seen)] if costs else figures


def _durably_done(contestant: Contestant, arena: Arena) -> int:
    """When all was durably done (ns)."""
    deadline = time.monotonic() + DONE_SECONDS
    with arena.connect() as connection:
        while time.monotonic() < deadline:
            row = connection.execute(contestant.done.encode()).fetchone()
            if row is not None and row[0]:
                return time.monotonic_ns()
            time.sleep(0.005)
    raise Failure(
        f"{contestant.name}: all {arena.jobs:,} jobs have run, but are not done after {DONE_SECONDS:g} s"
    )


def _costs(usage: Usage, jobs: int) -> Figures:
    each = 1e6 / max(1, jobs)
    return [
        ("µs of workers' CPU per job", usage.workers * each),
        ("µs of PostgreSQL's CPU per job", usage.postgres * each),
        ("µs of Redis's CPU per job", usage.redis * each),
    ]


def check(contestant: Contestant, arena: Arena) -> None:
    """Pmqd has kept every row, and one audit line per attempt.

    Raises:
        Failure: it has not.
    """
    if not contestant.name.startswith("pmqd"):
        return
    with arena.connect() as connection:
        row = connection.execute(
            "select (select count(*) from pmqd.jobs where status = 'completed' and kind is not null),"
            " (select count(*) from pmqd.job_logs where status = 'success')"
        ).fetchone()
    if row != (arena.jobs, arena.jobs):
        raise Failure(f"{contestant.name}: of {arena.jobs:,} jobs (completed, logged): {row}")


DRAIN = Work(
    "drain",
    f"jobs that do nothing, enqueued first: {MOST_JOBS:,}; "
    + ", ".join(f"{name} {jobs:,}" for name, jobs in JOBS.items()),
    {
        name: partial(measure, name)
        for name in (
            "pmqd",
            "pmqd-full",
            "pmqd-direct",
            "graphile-worker",
            "pgqueuer",
            "celery",
            "dramatiq",
            "bullmq",
            "procrastinate",
        )
    },
)
