"""What `/metrics` measures at the moment it is asked: workers from the arena, depths and servers from the stores.

None of it is kept in a file, so what is gone leaves no series behind.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from pmqd.arena import Arena, Kind, Slot, State
from pmqd.backend import Figures, RedisFigures
from pmqd.config import Settings
from pmqd.metrics import MAX_PAIRS, OTHER, CounterSamples, Gauge

_STATES = {State.STARTING: "starting", State.IDLE: "idle", State.BUSY: "busy", State.DRAINING: "draining"}
_DEPTHS = ("ready", "scheduled", "running", "failed")
_WINDOW_SECONDS = 15.0
Samples = Sequence[tuple[Mapping[str, str], float]]
_SAMPLES = 120


class BusyRatio:
    """How busy each pool was over the last quarter of a minute, from the workers' own counts.

    Looks are kept between calls: two scrapers, or one every second, see the same figure.
    """

    def __init__(self) -> None:
        self._looks: deque[tuple[float, dict[tuple[int, int], float]]] = deque(maxlen=_SAMPLES)

    def measure(self, arena: Arena, capacity: Mapping[str, int], now: float) -> dict[str, float]:
        """Share of the pools' places that were busy since the oldest look in the window, 0 to 1.

        Args:
            arena: the shared memory.
            capacity: places (concurrency) of one worker of the pool, by pool name.
            now: `time.monotonic()`.
        """
        workers = [slot for slot in arena.slots if slot.live and slot.kind == Kind.WORKER]
        look = {(slot.index, slot.pid): _busy_seconds(slot, now) for slot in workers}
        while len(self._looks) > 1 and now - self._looks[0][0] > _WINDOW_SECONDS:
            self._looks.popleft()
        before = self._looks[0] if self._looks else (now, look)
        self._looks.append((now, look))
        seconds, places = now - before[0], Counter[str]()
        busy: dict[str, float] = {}
        for slot in workers:
            spent = look[slot.index, slot.pid] - before[1].get((slot.index, slot.pid), 0.0)
            busy[slot.pool] = busy.get(slot.pool, 0.0) + max(0.0, spent)
            places[slot.pool] += max(1, capacity.get(slot.pool, 1))
        return {
            pool: min(1.0, busy[pool] / seconds / places[pool]) if seconds > 0 else 0.0 for pool in places
        }


def _busy_seconds(slot: Slot, now: float) -> float:
    """What the worker has counted, and what runs and is not counted yet: a long job is busy time before its end."""
    return slot.busy_ns / 1e9 + sum(max(0.0, now - job.started) for job in slot.running())


def measure(
    settings: Settings, arena: Arena, figures: Figures, redis: RedisFigures, *, busy: BusyRatio, now: float
) -> list[Gauge]:
    """All gauges of the page.

    Args:
        settings: for the pools.
        arena: the shared memory.
        figures: the last that PostgreSQL said, old ones while it is away.
        redis: the last that Redis said.
        busy: the looks of the scrapes before.
        now: `time.monotonic()`.
    """
    capacity = {pool.name: pool.concurrency for pool in settings.workers}
    return [
        *_worker_gauges(arena, busy.measure(arena, capacity, now)),
        *_pool_gauges(settings, arena),
        *_queue_gauges(figures, redis, now),
        *_server_gauges(arena, redis, now),
    ]


def exit_counters(arena: Arena) -> list[CounterSamples]:
    """Counters that the master keeps in the arena."""
    samples = [({"reason": reason}, float(n)) for reason, n in arena.exits().items()]
    return [CounterSamples("pmqd_worker_exits", "Worker processes that ended, by reason.", samples)]


def _worker_gauges(arena: Arena, ratios: Mapping[str, float]) -> list[Gauge]:
    found: Counter[str] = Counter()
    for slot in arena.slots:
        if slot.kind == Kind.WORKER and slot.state in _STATES:
            found[_STATES[slot.state]] += 1
    found["backoff"] = arena.backoff
    states = [({"state": state}, float(found[state])) for state in (*_STATES.values(), "backoff")]
    busy = [({"pool": pool}, ratio) for pool, ratio in sorted(ratios.items())]
    return [
        Gauge("pmqd_workers", "Worker processes by state.", states),
        Gauge("pmqd_worker_busy_ratio", "Share of the pool's places that run a job.", busy),
    ]


def _pool_gauges(settings: Settings, arena: Arena) -> list[Gauge]:
    memory: Counter[str] = Counter({pool.name: 0 for pool in settings.workers})
    for slot in arena.slots:
        if slot.live and slot.kind == Kind.WORKER:
            memory[slot.pool] += slot.rss_kb * 1024
    processes = [({"pool": pool.name}, float(pool.processes)) for pool in settings.workers]
    places = [({"pool": pool.name}, float(pool.processes * pool.concurrency)) for pool in settings.workers]
    used = [({"pool": pool}, float(size)) for pool, size in sorted(memory.items())]
    return [
        Gauge("pmqd_pool_processes", "Configured processes of a pool.", processes),
        Gauge("pmqd_pool_places", "Jobs that a pool can run at once.", places),
        Gauge("pmqd_pool_memory_bytes", "Resident memory of a pool's workers.", used),
    ]


def _queue_gauges(figures: Figures, redis: RedisFigures, now: float) -> list[Gauge]:
    depths: Counter[tuple[str, str]] = Counter()
    oldest: dict[str, float] = {}
    for place, (name, row) in enumerate(figures.queues.items()):
        queue = name if place < MAX_PAIRS else OTHER
        for state in _DEPTHS:
            depths[queue, state] += row[state]
        if redis.up:
            depths[queue, "in_redis"] += redis.lengths.get(name, 0)
        oldest[queue] = max(oldest.get(queue, 0.0), row["oldest_ready_seconds"])
    samples = [({"queue": queue, "state": state}, float(n)) for (queue, state), n in depths.items()]
    lateness = [({"queue": queue}, seconds) for queue, seconds in oldest.items()]
    age: Samples = [({}, now - figures.at)] if figures.queues or figures.at > 0 else []
    return [
        Gauge("pmqd_queue_depth", "Jobs of a queue by state; in_redis counts hints.", samples),
        Gauge("pmqd_queue_oldest_ready_seconds", "How long the oldest ready job has been waiting.", lateness),
        Gauge(
            "pmqd_queue_depth_age_seconds",
            "How old the depths are; they stand still while PostgreSQL is away.",
            age,
        ),
    ]


def _server_gauges(arena: Arena, redis: RedisFigures, now: float) -> list[Gauge]:
    direct = arena.redis_down or any(s.direct for s in arena.slots if s.live and s.kind == Kind.WORKER)
    modes = [({"mode": "redis"}, float(not direct)), ({"mode": "direct"}, float(direct))]
    lease = arena.lease_age(now)
    info = [
        ("pmqd_redis_memory_bytes", "Memory that Redis uses.", "used_memory"),
        ("pmqd_redis_clients", "Connections to Redis.", "connected_clients"),
    ]
    return [
        Gauge("pmqd_mode", "How jobs reach the workers: 1 for the mode that holds.", modes),
        Gauge("pmqd_postgres_up", "Whether PostgreSQL answered last.", [({}, float(not arena.store_down))]),
        Gauge("pmqd_redis_up", "Whether Redis answered last.", [({}, float(redis.up))]),
        Gauge("pmqd_lease_age_seconds", "Since the instance's lease was renewed.", _finite(lease)),
        *(Gauge(name, text, _info(redis.info, key)) for name, text, key in info),
    ]


def _finite(value: float) -> Samples:
    return [({}, value)] if value != float("inf") else []


def _info(info: Mapping[str, Any], key: str) -> Samples:
    value = info.get(key)
    return [({}, float(value))] if isinstance(value, int | float) else []
