"""`backlog` and `memory`: a million jobs that are ready."""

import time
from functools import partial
from typing import Any

import redis

from benchmarks.peers import slots
from benchmarks.peers.arena import private
from benchmarks.peers.field import FIELD
from benchmarks.watch import Watch
from benchmarks.works.work import Figures, Scale, Work, rate, running

JOBS = 1_000_000
SECONDS = 60.0
MEMORY_SECONDS = 10.0
_SAMPLE_SECONDS = 0.05


def measure(name: str, scale: Scale) -> Figures:
    """One contestant's rate while it works for a minute, or until nothing is left."""
    contestant, seconds = FIELD[name], scale.seconds_or(SECONDS)
    with private(scale.jobs_or(JOBS)) as arena:
        contestant.fill(arena)
        arena.settled()
        with running(contestant, arena) as workers:
            watch = Watch(arena, workers)
            watch.until_first()
            watch.until_all(time.monotonic() + seconds)
            watch.close()
            starts = sorted(filter(None, slots.read(str(arena.slots), arena.jobs)[0]))
    until = starts[0] + seconds * 1e9
    counted = [start for start in starts if start <= until]
    tenth = max(2, len(counted) // 10)
    return [
        ("jobs/s", rate(counted)),
        ("last tenth's rate / first tenth's", rate(counted[-tenth:]) / rate(counted[:tenth])),
        ("jobs done", len(counted)),
    ]


def measure_memory(scale: Scale) -> Figures:
    """What Redis holds at most while pmqd works on a million jobs, over what the empty server needs."""
    contestant = FIELD["pmqd"]
    with private(scale.jobs_or(JOBS)) as arena:
        contestant.fill(arena)
        arena.settled()
        server = redis.Redis.from_url(arena.redis.url)
        empty = most = _used_bytes(server)
        with running(contestant, arena) as workers:
            watch = Watch(arena, workers)
            watch.until_first()
            until = time.monotonic() + scale.seconds_or(MEMORY_SECONDS)
            while time.monotonic() < until and not watch.until_all(0):
                most = max(most, _used_bytes(server))
                time.sleep(_SAMPLE_SECONDS)
            watch.close()
        server.close()
    return [("Redis MB over the empty server", (most - empty) / 1e6)]


def _used_bytes(server: Any) -> int:
    return int(server.info("memory")["used_memory"])


BACKLOG = Work(
    "backlog",
    f"{JOBS:,} ready jobs that do nothing, worked off for {SECONDS:g} s",
    {name: partial(measure, name) for name in ("pmqd", "graphile-worker", "pgqueuer", "bullmq")},
)
MEMORY = Work(
    "memory",
    f"the most that Redis holds (used_memory) in {MEMORY_SECONDS:g} s of work on {JOBS:,} ready jobs",
    {"pmqd": measure_memory},
)
