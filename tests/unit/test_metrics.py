"""Counters that survive their processes, the page that adds them up, and the gauges measured for it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pmqd import metrics
from pmqd.arena import Arena, State
from pmqd.backend import Figures, RedisFigures
from pmqd.config import PoolSettings, Settings
from pmqd.gauges import BusyRatio, exit_counters, measure
from pmqd.slot import REASONS

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Settled:
    """What `count_outcomes` reads of an outcome."""

    action: str
    job_id: UUID
    started: object = 1
    duration_seconds: float = 0.02
    queue_name: str = "mails"
    kind: str | None = "send"


@dataclass
class Given:
    """What `count_rescued` reads of a rescued job."""

    status: str
    fate: str
    queue_name: str = "mails"
    kind: str | None = "send"


@pytest.fixture(autouse=True)
def no_book() -> Iterator[None]:
    """No test counts in the files of another."""
    metrics.stop()
    yield
    metrics.stop()


def page(directory: Path, gauges: list[metrics.Gauge] | None = None) -> Samples:
    """The samples of the page."""
    text = metrics.render(directory, gauges or []).decode()
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    """One sample."""
    return samples[name, frozenset(labels.items())]


def in_child(work: Callable[[], None]) -> None:
    """Runs `work` in a forked process that then dies by SIGKILL."""
    pid = os.fork()
    if pid == 0:
        work()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_before_start_counting_does_nothing() -> None:
    """Producers and tests may call everything without a directory."""
    metrics.count_migrated("mails", "send", 3)
    metrics.count_outcomes([Settled("complete", uuid4())])
    metrics.observe_pickup("mails", None, 0.1)
    metrics.count_rescued([Given("failed", "charged")])
    metrics.count_stolen("mails", 1)
    metrics.count_reoffered("mails", 1)
    metrics.count_stale()


def test_counters_survive_the_death_of_their_process_and_go_on(tmp_path: Path) -> None:
    """A killed child's counts stay, the next one of its slot counts on, and the number of files does not grow."""

    def work() -> None:
        metrics.start(tmp_path, "worker-3")
        metrics.count_migrated("mails", "send", 5)
        metrics.observe_pickup("mails", "send", 0.003)

    for _ in range(5):
        in_child(work)
    samples = page(tmp_path)
    assert value(samples, "pmqd_jobs_migrated_total", queue="mails", kind="send") == 25
    assert value(samples, "pmqd_job_pickup_seconds_count", queue="mails", kind="send") == 5
    assert len(list(tmp_path.iterdir())) == 2


def test_the_page_adds_up_all_processes(tmp_path: Path) -> None:
    """Slots count in files of their own; the page shows their sum, once per series."""
    for slot in range(4):
        metrics.start(tmp_path, f"worker-{slot}")
        metrics.count_stolen("mails", slot)
        metrics.count_stale(2)
    samples = page(tmp_path)
    assert value(samples, "pmqd_stolen_total", queue="mails") == 6
    assert value(samples, "pmqd_stale_settles_total") == 8


def test_outcomes_are_counted_by_what_the_settle_answered(tmp_path: Path) -> None:
    """The new status decides over the wish, a refused settle counts as nothing, a release has not started."""
    metrics.start(tmp_path, "worker-0")
    wished = ["complete", "fail", "retry", "retry", "interrupt", "interrupt", "snooze", "cancel", "complete"]
    became = ["completed", "failed", "queued", "cancelled", "queued", "failed", "queued", "cancelled", None]
    outcomes = [Settled(action, uuid4()) for action in wished]
    released = Settled("release", uuid4(), started=None)
    statuses = {o.job_id: status for o, status in zip(outcomes, became, strict=True) if status}
    metrics.count_outcomes([*outcomes, released], {**statuses, released.job_id: "queued"})
    samples, labels = page(tmp_path), {"queue": "mails", "kind": "send"}
    assert value(samples, "pmqd_jobs_started_total", **labels) == 8
    assert value(samples, "pmqd_jobs_completed_total", **labels) == 1
    assert value(samples, "pmqd_jobs_failed_total", **labels) == 2
    assert value(samples, "pmqd_jobs_retried_total", **labels) == 1
    assert value(samples, "pmqd_job_duration_seconds_count", **labels) == 8
    assert value(samples, "pmqd_job_duration_seconds_sum", **labels) == pytest.approx(0.16)


def test_buckets_are_cumulative_and_complete(tmp_path: Path) -> None:
    """A histogram has every bucket, rising to its count; a value on an edge belongs below it."""
    metrics.start(tmp_path, "worker-0")
    metrics.observe_pickups("mails", "send", [0.001, 0.0011, 3, 1e6, -1])
    samples = page(tmp_path)
    found = [
        value(samples, "pmqd_job_pickup_seconds_bucket", queue="mails", kind="send", le=le)
        for le in ("0.001", "0.0025", "2.5", "5.0", "300.0", "+Inf")
    ]
    assert found == [2, 3, 3, 4, 4, 5]
    assert sum(name == "pmqd_job_pickup_seconds_bucket" for name, _ in samples) == 17


def test_rescues_count_as_job_logs_has_them(tmp_path: Path) -> None:
    """A rescued attempt that had started is one `crashed` row: started and rescued; used up, it is failed as well."""
    metrics.start(tmp_path, "maintenance-0")
    metrics.count_rescued(
        [
            Given("queued", "charged"),
            Given("failed", "charged"),
            Given("queued", "interrupted"),
            Given("queued", "unstarted"),
        ]
    )
    samples = page(tmp_path)
    assert value(samples, "pmqd_rescued_total", queue="mails") == 3
    assert value(samples, "pmqd_jobs_started_total", queue="mails", kind="send") == 3
    assert value(samples, "pmqd_jobs_failed_total", queue="mails", kind="send") == 1
    assert value(samples, "pmqd_poisoned_total", queue="mails") == 1


def test_labels_are_bounded_in_a_process_and_over_all(tmp_path: Path) -> None:
    """Queues and kinds beyond the bound are "other": in one process, after its restart, and in the sum of several."""
    for slot in range(3):
        for _ in range(2):
            metrics.start(tmp_path, f"worker-{slot}")
            for n in range(300):
                metrics.count_migrated(f"q{slot}-{n}", "k")
    samples = page(tmp_path)
    counted = {labels: v for (name, labels), v in samples.items() if name == "pmqd_jobs_migrated_total"}
    assert len(counted) <= metrics.MAX_PAIRS + 1
    assert sum(counted.values()) == 1800


def test_a_broken_value_file_neither_breaks_the_page_nor_a_start(tmp_path: Path) -> None:
    """A file torn by a power cut is left out of the page, and replaced by the next process of its slot."""
    metrics.start(tmp_path, "worker-0")
    metrics.count_stolen("mails", 4)
    (tmp_path / "counter_worker-1.db").write_bytes(b"\x00\x01\x00\x00" + b"\xff" * 500)
    (tmp_path / "histogram_worker-1.db").write_bytes(b"")
    assert value(page(tmp_path), "pmqd_stolen_total", queue="mails") == 4
    metrics.start(tmp_path, "worker-1")
    metrics.count_stolen("mails", 1)
    assert value(page(tmp_path), "pmqd_stolen_total", queue="mails") == 5


def test_counting_is_cheap(tmp_path: Path) -> None:
    """A batch costs a few microseconds per job, well below the 15 that a job may cost in all."""
    code = (
        "import sys, time; from pathlib import Path; from uuid import uuid4; from tests.unit.test_metrics import Settled;"
        "from pmqd import metrics; metrics.start(Path(sys.argv[1]), 'w');"
        "batch = [Settled('complete', uuid4()) for _ in range(500)]; known = {o.job_id: 'completed' for o in batch};"
        "best = 1e9\n"
        "for _ in range(10):\n"
        "    t = time.process_time(); metrics.count_outcomes(batch, known); best = min(best, time.process_time() - t)\n"
        "print(best / 500 * 1e6)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path.cwd(),
    )
    assert float(done.stdout) < 10


# --- gauges --------------------------------------------------------------------------------------------------


def settings(processes: int = 2) -> Settings:
    """One pool."""
    return Settings(workers=[PoolSettings(name="mail", app="a:b", processes=processes, concurrency=2)])


def arena_of(*states: State) -> Arena:
    """An arena with workers in these states."""
    arena = Arena.create(len(states), 2)
    for slot, state in zip(arena.slots, states, strict=True):
        slot.open("worker", f"host:x:w{slot.index}.1", pool="mail", pool_index=0)
        slot.pid, slot.state = 1000 + slot.index, state
    return arena


def measured(
    arena: Arena, figures: Figures | None = None, redis: RedisFigures | None = None, now: float = 100.0
) -> Samples:
    """The gauges as samples."""
    found = measure(
        settings(), arena, figures or Figures(), redis or RedisFigures(), busy=BusyRatio(), now=now
    )
    return {
        (gauge.name, frozenset(labels.items())): number for gauge in found for labels, number in gauge.samples
    }


def test_workers_are_counted_by_state_and_the_dead_are_not() -> None:
    """Every state has its series, zero included; dead and rescued slots count nowhere."""
    arena = arena_of(
        State.IDLE, State.BUSY, State.BUSY, State.DEAD, State.RESCUED, State.FREE, State.STARTING
    )
    arena.backoff = 3
    samples = measured(arena)
    found = {
        state: value(samples, "pmqd_workers", state=state)
        for state in ("starting", "idle", "busy", "draining", "backoff")
    }
    assert found == {"starting": 1, "idle": 1, "busy": 2, "draining": 0, "backoff": 3}


def test_the_busy_ratio_is_of_the_pool_s_places_over_a_while() -> None:
    """One of two places busy for half of the time is a quarter; a restarted worker's counter does not count as time."""
    arena, ratio = arena_of(State.BUSY), BusyRatio()
    assert ratio.measure(arena, {"mail": 2}, 10.0) == {"mail": 0.0}
    arena.slots[0].busy_ns = int(5e9)
    assert ratio.measure(arena, {"mail": 2}, 20.0) == {"mail": pytest.approx(0.25)}
    arena.slots[0].busy_ns, arena.slots[0].pid = 0, 77
    assert ratio.measure(arena, {"mail": 2}, 21.0) == {"mail": 0.0}


def test_a_job_that_runs_is_busy_time_before_its_end() -> None:
    """An hour's job shows as busy at once, not an hour later."""
    arena, ratio, now = arena_of(State.BUSY), BusyRatio(), time.monotonic()
    arena.slots[0].begin(0, uuid4(), uuid4(), None)
    ratio.measure(arena, {"mail": 1}, now)
    assert ratio.measure(arena, {"mail": 1}, now + 10) == {"mail": pytest.approx(1.0, abs=0.01)}


def test_depths_and_lateness_by_queue_and_state() -> None:
    """All states of the contract are there; hints only while Redis answers, and no stale figure is left of them."""
    row = {"ready": 4, "scheduled": 3, "running": 2, "failed": 1, "oldest_ready_seconds": 7.5}
    figures = Figures({"mails": row}, at=90.0)
    samples = measured(arena_of(), figures, RedisFigures({"mails": 9}, {"used_memory": 5}, up=True))
    for state, n in {"ready": 4, "scheduled": 3, "running": 2, "failed": 1, "in_redis": 9}.items():
        assert value(samples, "pmqd_queue_depth", queue="mails", state=state) == n
    assert value(samples, "pmqd_queue_oldest_ready_seconds", queue="mails") == 7.5
    assert value(samples, "pmqd_queue_depth_age_seconds") == 10
    assert value(samples, "pmqd_redis_memory_bytes") == 5
    away = measured(arena_of(), figures)
    assert ("pmqd_queue_depth", frozenset({("queue", "mails"), ("state", "in_redis")})) not in away
    assert value(away, "pmqd_redis_up") == 0


def test_queues_beyond_the_bound_are_one() -> None:
    """Thousands of queues do not become thousands of series, and nothing is lost from the sum."""
    row = {"ready": 1, "scheduled": 0, "running": 0, "failed": 0, "oldest_ready_seconds": 1.0}
    samples = measured(arena_of(), Figures({f"q{n:04}": row for n in range(1000)}, at=1.0))
    ready = [
        number
        for (name, labels), number in samples.items()
        if name == "pmqd_queue_depth" and ("state", "ready") in labels
    ]
    assert (len(ready), sum(ready)) == (metrics.MAX_PAIRS + 1, 1000)


def test_the_mode_is_direct_where_redis_is_down_or_a_worker_works_without() -> None:
    """Exactly one mode holds."""
    arena = arena_of(State.IDLE)
    assert value(measured(arena), "pmqd_mode", mode="redis") == 1
    arena.slots[0].direct = True
    assert (
        value(measured(arena), "pmqd_mode", mode="direct"),
        value(measured(arena), "pmqd_mode", mode="redis"),
    ) == (1, 0)
    arena.slots[0].direct, arena.redis_down = False, True
    assert value(measured(arena), "pmqd_mode", mode="direct") == 1


def test_worker_exits_come_from_the_arena(tmp_path: Path) -> None:
    """The master counts exits in shared memory; every reason has its series from the start."""
    arena = arena_of(State.BUSY)
    arena.slots[0].bury(-9, "oom")
    text = metrics.render(tmp_path, counters=exit_counters(arena)).decode()
    assert 'pmqd_worker_exits_total{reason="oom"} 1.0' in text
    assert text.count("pmqd_worker_exits_total{") == len(REASONS)
