"""Worker processes without a master: an arena, hand-made contexts, forked children; and plain SQL and hints for them.

The test plays the master (fork, signal, reap), the migrator (hints by LPUSH, as a foreign producer) and maintenance
(the instance's lease, which never runs out because nobody ticks). There is no pulse, so a worker asks PostgreSQL
itself when a pop came back empty, unless the test sets one.
"""

import multiprocessing
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson
import psycopg
import redis
from psycopg.rows import dict_row

from pmqd import App, logs, worker
from pmqd.arena import Arena
from pmqd.process import ChildContext, StopFlag
from pmqd.settings import LogSettings, PoolSettings, Settings
from pmqd.slot import Kind, Slot
from pmqd.store import Store

_fork = multiprocessing.get_context("fork")


class Family:
    """One instance's workers over one database and one Redis."""

    def __init__(self, dsn: str, redis_url: str, app: App, folder: Path, **settings: Any) -> None:
        """Takes where the stores are, the application, a folder, and settings by section (`pool`, `redis`, others)."""
        self.dsn, self.redis_url, self.app, self.folder = dsn, redis_url, app, folder
        module: Any = types.ModuleType("worker_test_app")
        module.app = app
        sys.modules["worker_test_app"] = module
        pool = settings.pop("pool", {})
        self.pool = PoolSettings(**{"name": "test", "app": "worker_test_app:app", "processes": 1, **pool})
        self.settings = Settings.model_validate(
            {
                "state_dir": folder,
                "postgres": {"dsn": dsn, **settings.pop("postgres", {})},
                "redis": {"url": redis_url, **settings.pop("redis", {})},
                **settings,
            }
        )
        self.arena = Arena.create(8, entries=32)
        self.arena.instance_id = uuid4()
        self.children: list[tuple[Slot, BaseProcess]] = []
        self.log = folder / "worker.log"
        self.register()

    def register(self) -> None:
        """Gives the instance its lease."""
        store = Store(self.settings.postgres, "test")
        store.register(self.arena.instance_id, "host", os.getpid(), self.app.registry.queues(), [], {})
        store.close()

    def start(self, *, wait: bool = True) -> Slot:
        """Forks one worker; returns its record in the arena."""
        slot = self.arena.slots[len(self.children)]
        worker_id = f"host:{self.arena.instance_id.hex[-8:]}:w{slot.index}.1"
        slot.open("worker", worker_id, pool=self.pool.name, pool_index=0)
        process = _fork.Process(target=self._child, args=(slot,))
        process.start()
        slot.pid = process.pid or 0
        self.children.append((slot, process))
        deadline = time.monotonic() + 10
        while wait and not slot.ready:
            assert process.is_alive(), f"the worker ended with {process.exitcode}:\n{self.logged()}"
            assert time.monotonic() < deadline, "the worker is not ready"
            time.sleep(0.002)
        return slot

    def logged(self) -> str:
        """What the workers have logged."""
        return self.log.read_text() if self.log.exists() else ""

    def records(self, words: str) -> list[dict[str, Any]]:
        """The log records whose message holds these words."""
        records = [orjson.loads(line) for line in self.logged().splitlines() if line.startswith("{")]
        return [record for record in records if words in record["message"]]

    def process(self, slot: Slot) -> BaseProcess:
        """The process of a record."""
        return next(process for each, process in self.children if each is slot)

    def terminate(self, slot: Slot) -> None:
        """Tells a worker to drain."""
        self.process(slot).terminate()

    def stop(self, slot: Slot, timeout: float = 15.0) -> int:
        """Drains a worker; its exit code."""
        self.terminate(slot)
        return self.wait_end(slot, timeout)

    def wait_end(self, slot: Slot, timeout: float = 15.0) -> int:
        """Waits for a worker's end; its exit code."""
        process = self.process(slot)
        process.join(timeout)
        assert process.exitcode is not None, f"the worker has not ended within {timeout} s:\n{self.logged()}"
        return process.exitcode

    def close(self) -> None:
        """Kills what is left."""
        for _, process in self.children:
            process.kill()
            process.join()
        sys.modules.pop("worker_test_app", None)

    def _child(self, slot: Slot) -> None:
        # The first steps of pmqd.process.enter that matter here.
        stop = StopFlag()
        stop.listen()
        out = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(out, 2)
        os.dup2(out, 1)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        logs.configure(LogSettings(format="json"), f"worker {slot.index}")
        context = ChildContext(
            settings=self.settings,
            arena=self.arena,
            slot=slot,
            worker_id=slot.worker_id,
            kind=Kind.WORKER,
            pool=self.pool,
            pool_index=0,
            web_socket=None,
            stop=stop,
            state_dir=self.folder,
            host="host",
            previous_instances=(),
        )
        code = 70
        try:
            code = worker.main(context)
        except BaseException:  # noqa: BLE001 - told by the exit code and the log
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)


@contextmanager
def family(*args: Any, **settings: Any) -> Iterator[Family]:
    """A family whose workers are gone afterwards."""
    made = Family(*args, **settings)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def open_bank(dsn: str, redis_url: str) -> "Iterator[Bank]":
    """A bank that is closed afterwards, whatever the test did."""
    made = Bank(dsn, redis_url)
    try:
        yield made
    finally:
        made.close()


class Bank:
    """The test's own look at the stores."""

    def __init__(self, dsn: str, redis_url: str) -> None:
        self.dsn = dsn
        self.connection = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)
        self.redis = redis.Redis.from_url(redis_url)

    def close(self) -> None:
        """Ends the connections."""
        self.connection.close()
        self.redis.close()

    def reconnect(self) -> None:
        """A new connection, after PostgreSQL was started again."""
        self.connection.close()
        self.connection = psycopg.connect(self.dsn, autocommit=True, row_factory=dict_row)

    def enqueue(
        self, kind: str | None, payload: Any = None, *, queue: str = "q", hint: bool = True, **columns: Any
    ) -> UUID:
        """One job by plain SQL, and its hint."""
        columns = {
            "queue_name": queue,
            "kind": kind,
            "payload": orjson.dumps(payload or {}).decode(),
            **columns,
        }
        names, values = ", ".join(columns), ", ".join(f"%({name})s" for name in columns)
        row = self.connection.execute(
            f"insert into pmqd.jobs ({names}) values ({values}) returning id", columns
        ).fetchone()
        assert row is not None
        if hint:
            self.hint(row["id"], queue)
        return UUID(str(row["id"]))

    def enqueue_many(self, kind: str, count: int, *, queue: str = "q", hint: bool = True) -> list[UUID]:
        """Many jobs without arguments."""
        rows = self.connection.execute(
            "insert into pmqd.jobs (queue_name, kind, payload) select %s, %s, '{}' from generate_series(1, %s)"
            " returning id",
            (queue, kind, count),
        ).fetchall()
        ids = [row["id"] for row in rows]
        if hint and ids:
            self.redis.lpush(f"queue:{queue}", *map(str, ids))
        return ids

    def hint(self, job_id: UUID, queue: str = "q", band: str = "") -> None:
        """Pushes a hint as a foreign producer does."""
        self.redis.lpush(f"queue:{queue}{band}", str(job_id))

    def job(self, job_id: UUID) -> dict[str, Any]:
        """A row of `jobs`."""
        row = self.connection.execute("select * from pmqd.jobs where id = %s", (job_id,)).fetchone()
        assert row is not None
        return row

    def status(self, job_id: UUID) -> str:
        """A job's status."""
        return str(self.job(job_id)["status"])

    def counts(self) -> dict[str, int]:
        """How many jobs there are of each status."""
        rows = self.connection.execute("select status, count(*) from pmqd.jobs group by 1").fetchall()
        return {row["status"]: row["count"] for row in rows}

    def logs(self, job_id: UUID) -> list[str]:
        """The statuses of a job's audit trail, in order."""
        rows = self.connection.execute(
            "select status from pmqd.job_logs where job_id = %s order by id", (job_id,)
        ).fetchall()
        return [row["status"] for row in rows]

    def claims(self) -> int:
        """How many claims are listed."""
        row = self.connection.execute("select count(*) from pmqd.claims").fetchone()
        assert row is not None
        return int(row["count"])

    def wait(
        self, job_id: UUID, status: str = "completed", timeout: float = 10.0, watch: Callable[[], str] = str
    ) -> dict[str, Any]:
        """Waits for a job's status; the row."""
        deadline = time.monotonic() + timeout
        while (row := self.job(job_id))["status"] != status:
            assert time.monotonic() < deadline, f"not {status} within {timeout} s: {row}\n{watch()}"
            time.sleep(0.005)
        return row


def resume(pid: int) -> None:
    """Lets a stopped process go on."""
    os.kill(pid, signal.SIGCONT)
