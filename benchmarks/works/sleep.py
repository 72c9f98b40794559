"""`sleep`: jobs of 50 ms on 2 processes with 50 slots each."""

from functools import partial

from benchmarks.peers import slots
from benchmarks.peers.arena import private
from benchmarks.peers.field import FIELD
from benchmarks.watch import Watch
from benchmarks.works.work import Figures, Scale, Work, rate, running

SLEEP_SECONDS = 0.05
SLOTS = 100
JOBS = 5000
IDEAL = SLOTS / SLEEP_SECONDS


def measure(name: str, scale: Scale) -> Figures:
    """One contestant's share of what 100 slots could do."""
    contestant, jobs = FIELD[name], scale.jobs_or(JOBS)
    with private(jobs, sleep=SLEEP_SECONDS) as arena:
        contestant.fill(arena)
        arena.settled()
        with running(contestant, arena) as workers:
            watch = Watch(arena, workers, jobs, jobs)  # the ends
            watch.until_all()
            watch.close()
        starts, ends = slots.read(str(arena.slots), jobs)
    whole = jobs / ((max(ends) - min(starts)) / 1e9)
    return [
        ("share of ideal, middle 80 %", rate(sorted(starts), 0.8) / IDEAL),
        ("share of ideal, first start to last end", whole / IDEAL),
    ]


_PEERS = ("graphile-worker", "pgqueuer", "celery", "dramatiq", "bullmq", "procrastinate")
SLEEP = Work(
    "sleep",
    f"{JOBS:,} jobs of {SLEEP_SECONDS * 1000:g} ms on {SLOTS} slots in 2 processes, ideal {IDEAL:,.0f} jobs/s;"
    " pmqd: plain handlers in threads, pmqd-async: coroutines",
    {name: partial(measure, name) for name in ("pmqd", "pmqd-async", *_PEERS)},
)
