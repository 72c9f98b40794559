"""`pickup`, `pickup-flood`, `pickup-half`: from the acknowledged enqueue to the handler's start."""

import time
from functools import partial

from benchmarks.peers import slots
from benchmarks.peers.arena import Arena, Failure, private
from benchmarks.peers.field import FIELD, fill_pmqd, produce_pmqd
from benchmarks.peers.workers import Workers
from benchmarks.watch import Watch
from benchmarks.works import drain
from benchmarks.works.work import Figures, Scale, Work, running
from tests.history import quantile

SECONDS = 20.0
STEP_SECONDS = 0.02
HALF_STEP_SECONDS = 0.01
FLOOD_PER_SECOND = 60_000
"""Low jobs enqueued for each second of a flood: more than can be done."""
FLOOD_WARM_SECONDS = 3.0
LOW = 200
"""A priority of the low band."""
WARM_JOBS = 25
"""Not counted: during the first ones a producer still opens its connections."""
RATE_JOBS = 50_000
"""How many jobs tell the maximal rate."""


def measure(name: str, scale: Scale) -> Figures:
    """One contestant with idle workers."""
    contestant = FIELD[name]
    with private(_paced(scale), step=STEP_SECONDS) as arena:
        contestant.prepare(arena)
        arena.settled()
        with running(contestant, arena) as workers:
            workers.wait_idle()
            contestant.produce(arena)
            _all_started(arena, workers, arena.jobs)
        return _waits(arena, WARM_JOBS, arena.jobs)


def measure_flood(scale: Scale) -> Figures:
    """Pmqd with high jobs over a flood of low ones."""
    paced = _paced(scale)
    jobs = paced + scale.jobs_or(round(FLOOD_PER_SECOND * (scale.seconds_or(SECONDS) + FLOOD_WARM_SECONDS)))
    with private(jobs, step=STEP_SECONDS) as arena:
        fill_pmqd(arena, first=paced, priority=LOW)
        arena.settled()
        with running(FIELD["pmqd"], arena) as workers:
            flood = Watch(arena, workers, paced, jobs - paced)
            flood.until_first()
            time.sleep(FLOOD_WARM_SECONDS)
            begun, before = time.monotonic(), flood.count()
            produce_pmqd(arena, "produce_high", BENCH_PACED=str(paced))
            done, seconds = flood.count(), time.monotonic() - begun
            flood.close()
            if done == jobs - paced:
                raise Failure(f"the flood of {done:,} jobs was over before the high ones were")
            _all_started(arena, workers, paced)
        return [*_waits(arena, WARM_JOBS, paced), ("flood, jobs/s", (done - before) / seconds)]


def measure_half(scale: Scale) -> Figures:
    """Pmqd at half of the rate that it has just reached."""
    fastest = drain.measure("pmqd", Scale(scale.jobs_or(RATE_JOBS)))[0][1]
    batch = max(1, round(fastest / 2 * HALF_STEP_SECONDS))
    jobs = batch * round(scale.seconds_or(SECONDS) / HALF_STEP_SECONDS)
    contestant = FIELD["pmqd"]
    with private(jobs, step=HALF_STEP_SECONDS) as arena:
        contestant.prepare(arena)
        arena.settled()
        with running(contestant, arena) as workers:
            workers.wait_idle()
            produce_pmqd(arena, BENCH_BATCH=str(batch))
            _all_started(arena, workers, jobs)
        commits = slots.read_all(str(arena.slots), jobs)[2]
        produced = jobs / ((max(commits) - min(commits)) / 1e9 + HALF_STEP_SECONDS)
        return [*_waits(arena, 0, jobs), ("produced, jobs/s", produced), ("drained before, jobs/s", fastest)]


def _paced(scale: Scale) -> int:
    return WARM_JOBS + max(1, round(scale.seconds_or(SECONDS) / STEP_SECONDS))


def _all_started(arena: Arena, workers: Workers, jobs: int) -> None:
    watch = Watch(arena, workers, 0, jobs)
    watch.until_all()
    watch.close()


def _waits(arena: Arena, first: int, last: int) -> Figures:
    starts, _, commits = slots.read_all(str(arena.slots), arena.jobs)
    pairs = zip(starts[first:last], commits[first:last], strict=True)
    waits = [(start - commit) / 1e6 for start, commit in pairs]
    return [("p50 ms", quantile(waits, 0.5)), ("p99 ms", quantile(waits, 0.99)), ("max ms", max(waits))]


_PEERS = ("graphile-worker", "pgqueuer", "celery", "dramatiq", "bullmq", "procrastinate")
PICKUP = Work(
    "pickup",
    f"idle workers, one job each {STEP_SECONDS * 1000:g} ms for {SECONDS:g} s: handler's start minus the return of the commit;"
    " pmqd by plain SQL, the others by their clients",
    {name: partial(measure, name) for name in ("pmqd", "pmqd-bypass", *_PEERS)},
)
FLOOD = Work(
    "pickup-flood",
    "the same with jobs of the high band, over a backlog of low ones that is worked off at full speed",
    {"pmqd": measure_flood},
)
HALF = Work(
    "pickup-half",
    f"jobs enqueued for {SECONDS:g} s at half of the rate that a drain of {RATE_JOBS:,} has just shown,"
    f" one insert each {HALF_STEP_SECONDS * 1000:g} ms",
    {"pmqd": measure_half},
)
