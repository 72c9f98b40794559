"""What failures cost, measured: `python -m benchmarks.recovery [worker services master redis flush postgres plain direct]`.

Starts private servers and a daemon with two workers for each measurement, does the harm, and prints seconds and counts. The
clock is CLOCK_MONOTONIC throughout; starts and ends are recorded by the handlers, outside both stores.
"""

import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import redis

from pmqd import schema
from pmqd.embedded import PostgresServer, RedisServer
from tests.fix_daemon import Daemon, clean_environ, free_port
from tests.history import Mark, ends, enqueue, job, quantile, read, starts, statuses, until

TRIES = 20
RATE = 200
JOBS = 10_000


class Rig:
    """Private servers, one daemon, and the history of its handlers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.history = folder / "history"
        # As a real server would: the figures are about crashes.
        self.postgres = PostgresServer(folder / "pg", settings={"fsync": "on", "full_page_writes": "on"})
        self.redis = RedisServer(folder / "redis", tcp=True)
        self.dsn = ""

    def start_servers(self) -> None:
        """Both servers, and the schema."""
        self.postgres.start()
        self.redis.start()
        self.dsn = self.postgres.create_database("pmqd")
        schema.apply(self.dsn, schema="pmqd")

    def start_daemon(self) -> Daemon:
        """A daemon with two worker processes, ready."""
        return self.daemon().wait_ready()

    def daemon(self, name: str = "one", **more: Any) -> Daemon:
        """A daemon that has just been started; each name has its own folder, `more` are settings over the usual ones."""
        folder = self.folder / name
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        settings = {
            "state_dir": str(folder / "state"),
            "postgres": {"dsn": self.dsn},
            "redis": {"url": self.redis.url},
            "web": {"listen": f"127.0.0.1:{free_port()}"},
            "log": {"format": "json"},
            "workers": [{"app": "tests.applications.trial:app", "processes": 2}],
        }
        environ = clean_environ() | {"TRIAL_HISTORY": str(self.history), "TMPDIR": str(folder / "tmp")}
        return Daemon(folder, settings | more, environ)

    def connect(self) -> psycopg.Connection[Any]:
        """An autocommit connection."""
        return psycopg.connect(self.dsn, autocommit=True)


@contextmanager
def rig() -> Iterator[Rig]:
    """A rig that is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="pmqd-b-") as name:
        one = Rig(Path(name))
        one.start_servers()
        try:
            yield one
        finally:
            one.redis.stop()
            one.postgres.stop()


def wait(predicate: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for a condition; ends the program when it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not (value := predicate()):
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {seconds:g} s")
        time.sleep(0.002)
    return value


def report(what: str, seconds: list[float]) -> None:
    """One line: how many tries, median and worst."""
    print(
        f"{what:<58} n={len(seconds):<3} p50 {quantile(seconds, 0.5):6.3f} s  max {max(seconds):6.3f} s",
        flush=True,
    )


def measure_worker() -> None:
    """Kill -9 of a worker in the middle of a 10-second job, until the job's handler starts again."""
    with rig() as one, one.connect() as connection:
        daemon = one.start_daemon()
        took = []
        for _ in range(TRIES):
            job_id = enqueue(connection, "nap", seconds=10, attempts=3)
            first = wait(partial(starts, one.history, job_id), 10, "the start")[0]
            killed = time.monotonic()
            os.kill(first.pid, signal.SIGKILL)
            second = wait(partial(later_starts, one.history, job_id), 10, "the second start")[0]
            took.append(second.at - killed)
            connection.execute("update pmqd.jobs set cancel_requested = true where id = %s", (job_id,))
            wait(partial(ended, connection, job_id), 10, "the cancel")
        report("worker killed -> its job starts again", took)
        daemon.stop()


def ended(connection: psycopg.Connection[Any], job_id: UUID) -> bool:
    """Whether the job is in a terminal state."""
    return job(connection, job_id)["status"] in {"completed", "failed", "cancelled"}


def later_starts(history: Path, job_id: UUID) -> list[Mark]:
    """The starts of a job after its first."""
    return starts(history, job_id)[1:]


def is_gone(daemon: Daemon) -> bool:
    """Whether no process of the family lives (a dead one that nobody has reaped yet does not count)."""
    return not daemon.family()


def measure_services() -> None:
    """Kill -9 of each service, until a new one has replaced it."""
    with rig() as one:
        daemon = one.start_daemon()
        for kind in ("migrator", "maintenance", "web"):
            took = []
            for _ in range(TRIES):
                old = daemon.children(kind)[0].pid
                killed = time.monotonic()
                os.kill(old, signal.SIGKILL)
                wait(partial(replaced, daemon, kind, old), 10, f"a new {kind}")
                took.append(time.monotonic() - killed)
            report(f"{kind} killed -> ready again (by the master's log)", took)
        daemon.stop()


def replaced(daemon: Daemon, kind: str, old: int) -> bool:
    """Whether another child of that kind is ready."""
    new = [each.pid for each in daemon.children(kind) if each.pid != old]
    return bool(new) and f"{kind} (pid {new[0]}) is ready" in daemon.log


def measure_master() -> None:
    """Kill -9 of the master with a job running: until no descendant lives; and from the new start to the job's start."""
    with rig() as one, one.connect() as connection:
        gone, again = [], []
        for _ in range(5):
            daemon = one.start_daemon()
            job_id = enqueue(connection, "nap", seconds=60)
            wait(partial(starts, one.history, job_id), 10, "the start")
            killed = time.monotonic()
            daemon.kill()
            wait(partial(is_gone, daemon), 10, "the family's end")
            gone.append(time.monotonic() - killed)
            begun = time.monotonic()
            daemon = one.start_daemon()
            second = wait(partial(later_starts, one.history, job_id), 10, "the second start")[0]
            again.append(second.at - begun)
            connection.execute("update pmqd.jobs set cancel_requested = true where id = %s", (job_id,))
            wait(partial(ended, connection, job_id), 10, "the cancel")
            daemon.stop()
        report("master killed -> no descendant lives", gone)
        report("new master's first instruction -> the held job starts", again)


def produce(one: Rig, harm: dict[int, Callable[[], object]]) -> dict[UUID, float]:
    """JOBS jobs at RATE a second, one insert each; at a job's number harm is done. Returns acknowledged id -> moment."""
    done: dict[UUID, float] = {}
    connection: psycopg.Connection[Any] | None = None
    begin = time.monotonic()
    for number in range(JOBS):
        if number in harm:
            harm[number]()
        until(begin + number / RATE)
        try:
            connection = connection or one.connect()
            done[enqueue(connection, "nothing")] = time.monotonic()
        except psycopg.Error:
            connection = None
    return done


def account(one: Rig, done: dict[UUID, float], what: str) -> None:
    """Wait for the end; print what was lost, doubled, and how long jobs waited."""
    with one.connect() as connection:
        wait(lambda: set(statuses(connection)) == {"completed"}, 60, "all completed")
        row = connection.execute("select count(*) from pmqd.jobs").fetchone()
        twice = connection.execute(
            "select count(*) from (select job_id from pmqd.job_logs where status = 'success' group by 1 having count(*) > 1) d"
        ).fetchone()
    assert row is not None
    assert twice is not None
    first: dict[UUID, float] = {}
    for mark in read(one.history):
        if mark.mark == "S":
            first.setdefault(mark.job_id, mark.at)
    waits = [first[job_id] - at for job_id, at in done.items() if job_id in first]
    runs = ends(one.history)
    print(
        f"{what}: {len(done)} acknowledged, {row[0]} rows, lost {len(done) - len(waits)}, completed twice {twice[0]}, "
        f"run to the end twice {sum(count > 1 for count in runs.values())}; wait p50 {quantile(waits, 0.5) * 1000:.1f} ms, "
        f"p99 {quantile(waits, 0.99) * 1000:.1f} ms, max {max(waits) * 1000:.0f} ms",
        flush=True,
    )


def back_in_use(one: Rig, daemon: Daemon) -> float:
    """Start Redis; seconds until the daemon says that it is used again."""
    one.redis.start()
    begun = time.monotonic()
    wait(lambda: daemon.get("/healthz").json()["status"] == "ok", 10, "Redis used again")
    return time.monotonic() - begun


def measure_redis() -> None:
    """Redis killed at 200 jobs/s and started again five seconds later, three times."""
    with rig() as one:
        daemon = one.start_daemon()
        returns: list[float] = []
        harm: dict[int, Callable[[], object]] = {}
        for number in (2000, 5000, 8000):
            harm[number] = one.redis.kill
            harm[number + 5 * RATE] = lambda: returns.append(back_in_use(one, daemon))
        account(one, produce(one, harm), "redis killed 3 times for 5 s")
        report("redis started -> used again", returns)
        daemon.stop()


def measure_flush() -> None:
    """FLUSHALL at 200 jobs/s, ten times."""
    with rig() as one:
        daemon = one.start_daemon()

        def flush() -> None:
            with redis.Redis.from_url(one.redis.url) as client:
                client.flushall()

        account(one, produce(one, dict.fromkeys(range(500, JOBS, 1000), flush)), "redis flushed 10 times")
        daemon.stop()


def measure_postgres() -> None:
    """PostgreSQL stopped (immediate) at 200 jobs/s and started again two seconds later, three times."""
    with rig() as one:
        daemon = one.start_daemon()

        def crash() -> None:
            one.postgres.stop("immediate")
            time.sleep(2)
            one.postgres.start()

        account(
            one, produce(one, dict.fromkeys((2000, 5000, 8000), crash)), "postgres stopped 3 times for 2 s"
        )
        daemon.stop()


def measure_plain() -> None:
    """100,000 jobs by one plain insert; the rate from the insert's commit to the last row completed."""
    with rig() as one, one.connect() as connection:
        daemon = one.start_daemon()
        print(f"100,000 plain inserts: {drained(connection):,.0f} jobs/s", flush=True)
        daemon.stop()


def drained(connection: psycopg.Connection[Any]) -> float:
    """100,000 jobs by one plain insert: jobs per second from its commit to the last row completed."""
    before = statuses(connection).get("completed", 0)
    connection.execute(
        "insert into pmqd.jobs (queue_name, payload) select 'plain', '{}' from generate_series(1, 100000)"
    )
    inserted = time.monotonic()
    wait(lambda: statuses(connection) == {"completed": before + 100_000}, 120, "all completed")
    return 100_000 / (time.monotonic() - inserted)


def measure_direct() -> None:
    """The same with Redis and without it, alternating."""
    with rig() as one, one.connect() as connection:
        daemon = one.start_daemon()
        ratios = []
        for _ in range(5):
            with_redis = drained(connection)
            one.redis.kill()
            wait(lambda: daemon.get("/healthz").json()["status"] != "ok", 10, "Redis missed")
            without = drained(connection)
            back_in_use(one, daemon)
            ratios.append(without / with_redis)
            print(
                f"100,000 plain inserts: {with_redis:,.0f} jobs/s, without Redis {without:,.0f}", flush=True
            )
        print(
            f"without Redis / with it: median {quantile(ratios, 0.5):.2f}, lowest {min(ratios):.2f}",
            flush=True,
        )
        daemon.stop()


MEASUREMENTS = {
    name.removeprefix("measure_"): function
    for name, function in list(globals().items())
    if name.startswith("measure_")
}


def main(wanted: list[str]) -> None:
    """Run the named measurements, or all."""
    unknown = set(wanted) - set(MEASUREMENTS)
    if unknown:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(MEASUREMENTS)}")
    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )
    for name in wanted or MEASUREMENTS:
        MEASUREMENTS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
