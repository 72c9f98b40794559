"""One pair of the sweep: arm, drive, hit, fault, heal; and what must be so afterwards."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

import psutil
import pytest
from psycopg.rows import dict_row

from tests import history
from tests.fix_servers import wait_until
from tests.processes import lives
from tests.sweep_rig import Rig
from tests.sweep_roads import ROADS, STORE_FAULTS, Road, point_of

HIT_SECONDS: Final = 40.0
STANDS_SECONDS: Final = 1.0
"""How long a process stands still at a point: longer than claims may wait unstarted, a pulse, and a pop."""
OVER_SECONDS: Final = 60.0
MOST_ATTEMPTS: Final = 3
Fault = Callable[[Rig, psutil.Process], None]


def sweep(rig: Rig, point: str, fault: str) -> None:
    """One pair, from arming to the last check; whatever goes wrong, the next pair finds a rig that is whole."""
    road = ROADS[point]
    rig.ids.clear()
    rig.disarm()
    began, life = rig.surplus(), rig.lives
    try:
        _bring(rig, point_of(point), road)
        _apply(rig, fault, point)
        _heal(rig, road)
        _check_jobs(rig, point, fault, died=_family_died(point, fault))
        _check_stores(rig)
        if rig.lives == life:
            _soon(lambda: rig.surplus() == began, f"counters beside the audit trail: {began} before", rig)
    except BaseException as error:
        error.add_note(f"{point}, {fault}; the daemon's log ends:\n{rig.daemon.log[-6000:]}")
        rig.replace()
        raise


def _bring(rig: Rig, point: str, road: Road) -> None:
    """Until somebody stands, or has died, at the point: a pair that misses it is a failure."""
    rig.arm(point)
    deadline, again = time.monotonic() + HIT_SECONDS, 0.0
    while rig.armed(point):
        now = time.monotonic()
        if now >= deadline:
            pytest.fail(f"nobody passed {point} within {HIT_SECONDS:g} s")
        if now >= again:
            again = now + road.every
            road.bring(rig)
        time.sleep(0.005)


# --- faults


def _apply(rig: Rig, fault: str, point: str) -> None:
    if fault in ("kill", "exit"):
        kind = point.partition(".")[0]
        if kind == "master":
            rig.daemon.process.wait(20)
        elif fault == "exit" and not ROADS[point].ends:
            rig.exited(kind)
        return
    halted: Any = wait_until(rig.halted, 10, "a process that stands at the point")
    _FAULTS[fault](rig, halted)


def _stop(_rig: Rig, halted: psutil.Process) -> None:
    time.sleep(STANDS_SECONDS)  # the fault itself: all others go on meanwhile
    halted.resume()


def _orphan(rig: Rig, _halted: psutil.Process) -> None:
    rig.daemon.kill()


def _flush(rig: Rig, halted: psutil.Process) -> None:
    rig.redis.flushall()
    halted.resume()


def _kill_redis(rig: Rig, halted: psutil.Process) -> None:
    rig.servers.redis.kill()
    rig.servers.redis.start()
    halted.resume()


def _end_backends(rig: Rig, halted: psutil.Process) -> None:
    assert rig.end_backends(), "no session was there to be ended"
    halted.resume()


def _kill_postgres(rig: Rig, halted: psutil.Process) -> None:
    rig.servers.postgres.kill()
    halted.resume()
    rig.servers.postgres.start()
    rig.reconnect()


def _reset(rig: Rig, halted: psutil.Process) -> None:
    for wire in rig.wires:
        wire.reset()
    halted.resume()


_FAULTS: Final[dict[str, Fault]] = {
    "stop": _stop,
    "orphan": _orphan,
    "flush": _flush,
    "redis_killed": _kill_redis,
    "backends": _end_backends,
    "postgres_killed": _kill_postgres,
    "reset": _reset,
}


def _heal(rig: Rig, road: Road) -> None:
    """All that was broken is whole again, and the jobs of the pair come to their end."""
    if not rig.servers.postgres.running:
        rig.servers.postgres.start()
        rig.reconnect()
    if road.ends or rig.daemon.process.poll() is not None or not lives(rig.daemon.pid):
        rig.start_again()
    wait_until(lambda: _died(rig) or _all_over(rig), OVER_SECONDS, "the end of all jobs")
    if rig.daemon.process.poll() is not None:
        rig.start_again()
        wait_until(lambda: _all_over(rig), OVER_SECONDS, "the end of all jobs")
    wait_until(rig.whole, OVER_SECONDS, "a whole family, ready")


def _family_died(point: str, fault: str) -> bool:
    """Whether all processes of the instance died at once, and what stood in their shared memory with them."""
    return fault == "orphan" or (point.startswith("master.") and fault in ("kill", "exit"))


def _died(rig: Rig) -> bool:
    return rig.daemon.process.poll() is not None


def _all_over(rig: Rig) -> bool:
    row = rig.connection.execute(
        "select count(*) from pmqd.jobs where id = any(%s) and status not in ('completed', 'failed', 'cancelled')",
        (rig.ids,),
    ).fetchone()
    return row == (0,)


# --- checks


def _check_jobs(rig: Rig, point: str, fault: str, *, died: bool) -> None:
    """Every job is completed, settled once, charged for what its own handler may have done, and never ran beside itself."""
    cursor = rig.connection.cursor(row_factory=dict_row)
    jobs = cursor.execute("select * from pmqd.jobs where id = any(%s)", (rig.ids,)).fetchall()
    logs = _logs(rig)
    marks = _marks(rig)
    assert len(jobs) == len(rig.ids), "a job is gone"
    spare = ROADS[point].charged if fault in ("kill", "exit", "orphan") else 0
    # With a whole family its arena is gone: what it had claimed counts as interrupted, and work that was done may be done again.
    unheard = int(died)
    twice = len(jobs) if died else spare
    for job in jobs:
        told = f"{job}\n{logs[job['id']]}\n{marks[job['id']]}"
        assert job["status"] == "completed", told
        ends = [status for _, status in logs[job["id"]]]
        assert ends.count("success") == 1, f"not settled once: {told}"
        assert "retry" not in {status for _, status in logs[job["id"]]}, (
            f"charged for a store's absence: {told}"
        )
        # The handler whose own transaction is struck is cut by it; what raises writes no last line.
        raised = {attempt for attempt, status in logs[job["id"]] if status == "released"}
        assert not raised or (job["kind"] == "effect" and fault in STORE_FAULTS), told
        cut, done = _walk(marks[job["id"]], raised, told)
        # One that settles itself may have done so before its process died in the rest of it.
        assert done >= 1 or job["kind"] == "effect", f"its handler never came to its end: {told}"
        assert job["attempt_count"] <= MOST_ATTEMPTS, told
        spare -= max(0, job["attempt_count"] - 1 + job["interruptions"] - cut - unheard)
        twice -= max(0, done - 1)
        assert done <= 2, f"its handler came to its end {done} times: {told}"
        assert spare >= 0, f"charged, or interrupted, for nothing: {told}"
        assert twice >= 0, f"work that was done was done again: {told}"
    _check_effects(rig, jobs)


def _logs(rig: Rig) -> dict[UUID, list[tuple[int, str]]]:
    """The attempts that stand in the audit trail, and how each ended."""
    found: dict[UUID, list[tuple[int, str]]] = defaultdict(list)
    for job_id, attempt, status in rig.connection.execute(
        "select job_id, attempt_number, status from pmqd.job_logs where job_id = any(%s) order by id",
        (rig.ids,),
    ):
        found[job_id].append((attempt, status))
    return found


def _marks(rig: Rig) -> dict[UUID, list[history.Mark]]:
    wanted = set(rig.ids)
    found: dict[UUID, list[history.Mark]] = defaultdict(list)
    for mark in history.read(rig.history):
        if mark.job_id in wanted:
            found[mark.job_id].append(mark)
    return found


def _walk(marks: list[history.Mark], raised: set[int], told: str) -> tuple[int, int]:
    """How many runs were cut, and how many came to their end; between two of them lies an end, or the process's death."""
    cut = done = 0
    last: history.Mark | None = None
    for mark in marks:
        if mark.mark == "E":
            assert last is not None, told
            assert (last.pid, last.attempt) == (mark.pid, mark.attempt), f"two runs overlap: {told}"
            last, done = None, done + 1
            continue
        if last is not None:
            gone = last.attempt in raised or not lives(last.pid)
            assert gone, f"two runs overlap: {told}"
            cut += 1
        last = mark
    return cut, done


def _check_effects(rig: Rig, jobs: list[dict[str, Any]]) -> None:
    """What a handler wrote in its own settling transaction is there once."""
    wanted = {job["id"] for job in jobs if job["kind"] == "effect"}
    rows = rig.connection.execute(
        "select id, count(*) from effects where id = any(%s) group by id", (list(wanted),)
    ).fetchall()
    assert dict(rows) == dict.fromkeys(wanted, 1)


def _check_stores(rig: Rig) -> None:
    """No claim is listed, no hint lies about, no process stands still."""
    _soon(lambda: _count(rig, "pmqd.claims") == 0, "claims that nobody holds", rig)
    _soon(lambda: not list(rig.redis.scan_iter("queue:*")), "hints that lie about", rig)
    assert rig.halted() is None


def _count(rig: Rig, table: str) -> int:
    row = rig.connection.execute(f"select count(*) from {table}").fetchone()
    assert row is not None
    return int(row[0])


def _soon(right: Callable[[], bool], what: str, rig: Rig) -> None:
    deadline = time.monotonic() + 20
    while not right():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}; now {rig.surplus()}, {_count(rig, 'pmqd.claims')} claims")
        time.sleep(0.02)
