"""What `pmqd bench` measures, on the user's own servers: how soon one job starts, and how fast a backlog is done.

It works in a schema and under a Redis prefix of its own, both made for this one run and removed after it, with a
daemon of its own: no queue of yours is touched. Your servers feel the load all the same. Times are the
database's: `created_at`, `started_at` and `completed_at` of the jobs.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from pmqd import schema
from pmqd.broker import Broker
from pmqd.cli_enqueue import Entry
from pmqd.client import App
from pmqd.config import PostgresSettings, Settings
from pmqd.conninfo import complete
from pmqd.errors import PmqdError, SchemaError
from pmqd.job import BAND_RANGES, Job
from pmqd.sql_files import role_names
from pmqd.store import Store

QUEUE = "pmqd-bench"
PROBES = 100
READY_SECONDS = 60.0
STALL_SECONDS = 60.0

app = App()


@app.handler(QUEUE)
def nothing(job: Job) -> None:
    """What is measured: a job that does nothing."""


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured; seconds, and jobs per second."""

    jobs: int
    processes: int
    enqueue_per_second: float
    jobs_per_second: float
    pickup_p50_seconds: float
    pickup_p99_seconds: float


def run(settings: Settings, jobs: int, processes: int, say: Callable[[str], None]) -> Result:
    """Measures once.

    Args:
        settings: where the servers are.
        jobs: how long the backlog is.
        processes: worker processes of the private daemon.
        say: told what is being done.

    Raises:
        PmqdError: a server is away, the schema cannot be made, or the daemon does not get on.
    """
    mine = _private(settings)
    try:
        _make(mine)
        say(f"schema {mine.postgres.schema_name} made, starting a daemon with {processes} workers")
        with _daemon(mine, processes), contextlib.closing(Store(mine.postgres, "bench")) as store:
            producer = App(mine)
            with contextlib.closing(producer):
                return _measure(mine, producer, store, jobs=jobs, processes=processes, say=say)
    finally:
        try:
            _remove(mine)
            say(f"schema {mine.postgres.schema_name} removed")
        except psycopg.OperationalError:  # the error that led here says why; this must not hide it
            say(f"schema {mine.postgres.schema_name} is still there: PostgreSQL is away")


def _private(settings: Settings) -> Settings:
    """The same servers, with names that nobody else has."""
    name = f"pmqd_bench_{os.getpid()}_{int(time.time()) % 100_000}"
    postgres = PostgresSettings(**{**settings.postgres.model_dump(), "schema_name": name})
    redis = settings.redis.model_copy(update={"prefix": f"{name}:"})
    return settings.model_copy(update={"postgres": postgres, "redis": redis, "queues": {}})


def _make(mine: Settings) -> None:
    try:
        schema.apply(mine.postgres.direct, schema=mine.postgres.schema_name)
    except SchemaError as error:
        raise SchemaError(
            f"bench makes a schema and roles of its own, and removes them: use a user who may ({error})"
        ) from error


def _measure(
    mine: Settings, producer: App, store: Store, *, jobs: int, processes: int, say: Callable[[str], None]
) -> Result:
    say(f"{PROBES} single jobs on an idle daemon")
    for _ in range(PROBES):
        producer.enqueue(QUEUE, {})
        time.sleep(0.02)
    _drained(store)
    pickups = _column(mine, "select extract(epoch from started_at - created_at)::float8 from {} order by 1")
    say(f"a backlog of {jobs:,} jobs")
    store.pause(QUEUE)
    started = time.monotonic()
    producer.copy_many(Entry(QUEUE, {}) for _ in range(jobs))
    enqueued = time.monotonic() - started
    store.resume(QUEUE)
    _drained(store)
    [span] = _column(
        mine,
        "select extract(epoch from max(completed_at) - min(started_at))::float8 from"
        " (select * from {} order by id desc limit %s) as backlog",
        jobs,
    )
    return Result(
        jobs=jobs,
        processes=processes,
        enqueue_per_second=jobs / enqueued,
        jobs_per_second=jobs / max(span, 0.001),
        pickup_p50_seconds=pickups[len(pickups) // 2],
        pickup_p99_seconds=pickups[int(len(pickups) * 0.99) - 1],
    )


def _drained(store: Store) -> None:
    """Waits until nothing is left to run; gives up when nothing has moved for a minute."""
    left, since = -1, time.monotonic()
    while True:
        found = [depth for depth in store.depths() if depth.queue_name == QUEUE]
        now = sum(depth.ready + depth.scheduled + depth.running for depth in found)
        if now == 0:
            return
        if now != left:
            left, since = now, time.monotonic()
        elif time.monotonic() - since > STALL_SECONDS:
            raise PmqdError(f"{left} jobs of the benchmark have not moved for {STALL_SECONDS:.0f} s")
        time.sleep(0.05)


def _column(mine: Settings, query: str, *arguments: Any) -> list[float]:
    table = sql.Identifier(mine.postgres.schema_name, "jobs")
    with psycopg.connect(complete(mine.postgres.direct)) as connection:
        rows = connection.execute(sql.SQL(query).format(table), arguments).fetchall()
    return [float(value or 0.0) for (value,) in rows]


# --- the private daemon --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _daemon(mine: Settings, processes: int) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="pmqd-bench-") as folder:
        port = _free_port()
        log = Path(folder, "log")
        with log.open("wb") as out:
            command = [sys.executable, "-m", "pmqd", "run"]
            process = subprocess.Popen(  # noqa: S603 - this program, started again
                command,
                env=_environment(mine, Path(folder), port, processes),
                stdin=subprocess.DEVNULL,
                stderr=out,
            )
        try:
            _await_ready(process, port, log)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(mine.drain_seconds + 10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _environment(mine: Settings, folder: Path, port: int, processes: int) -> dict[str, str]:
    file = folder / "pmqd.toml"
    file.write_text("")
    pool = "PMQD_WORKERS__bench__"
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PMQD_")},
        "PMQD_CONFIG": str(file),
        "PMQD_STATE_DIR": str(folder / "state"),
        "PMQD_POSTGRES__DSN": mine.postgres.dsn,
        "PMQD_POSTGRES__DIRECT_DSN": mine.postgres.direct_dsn,
        "PMQD_POSTGRES__SCHEMA": mine.postgres.schema_name,
        "PMQD_REDIS__URL": mine.redis.url,
        "PMQD_REDIS__PREFIX": mine.redis.prefix,
        "PMQD_REDIS__ITEM": mine.redis.item,
        "PMQD_REDIS__JOB_STATUS": mine.redis.job_status,
        "PMQD_WEB__LISTEN": f"127.0.0.1:{port}",
        f"{pool}APP": "pmqd.bench:app",
        f"{pool}QUEUES": QUEUE,
        f"{pool}PROCESSES": str(processes),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_ready(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1),
        ):
            return
        time.sleep(0.05)
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    raise PmqdError(f"the daemon for the benchmark did not become ready: {last[0]}")


def _remove(mine: Settings) -> None:
    with psycopg.connect(complete(mine.postgres.direct), autocommit=True) as connection:
        connection.execute(
            sql.SQL("drop schema if exists {} cascade").format(sql.Identifier(mine.postgres.schema_name))
        )
        roles = [*role_names(mine.postgres.schema_name).values()]
        made = connection.execute("select rolname from pg_roles where rolname = any(%s)", [roles]).fetchall()
        for (role,) in made:
            connection.execute(sql.SQL("drop role {}").format(sql.Identifier(role)))
    with contextlib.closing(Broker(mine.redis, "bench")) as broker, contextlib.suppress(PmqdError):
        lists = [broker.queue_key(QUEUE, band) for band in BAND_RANGES]
        broker.clear_lists([*lists, f"{mine.redis.prefix}pmqd:epoch"])
