"""Crash-point sweep: whoever keeps the partitions, or replays failed jobs, is struck at each of its steps; the next one ends it."""

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final
from uuid import UUID

import psutil
import psycopg
import pytest

from pmqd import schema
from tests.fix_daemon import ROOT, clean_environ
from tests.fix_proxy import Proxy
from tests.fix_servers import wait_until
from tests.sweep_keeper import BATCH, Order
from tests.sweep_rig import Servers
from tests.sweep_roads import POSTGRES_FAULTS, PROCESS_FAULTS, pairs

STANDS_SECONDS: Final = 0.5
TEMPLATE: Final = "template_keeper"
FAILED: Final = 3 * BATCH - 5
_numbers = itertools.count(1)

AN_OLD_MONTH: Final = """
select pmqd.{step}('jobs', (date_trunc('month', now() at time zone 'utc') - interval '8 months')::date)
"""
OLD_ROWS: Final = """
insert into pmqd.jobs (id, queue_name, payload, status, ready, completed_at)
select overlay(pmqd.id_at((date_trunc('month', now() at time zone 'utc') - interval '8 months' + interval '14 days') at time zone 'utc')::text
  placing right(gen_random_uuid()::text, 22) from 15)::uuid, 'a', '1',
  case n % 3 when 0 then 'queued' else 'completed' end, n % 3 = 0,
  case n % 3 when 1 then now() - interval '220 days' when 2 then now() - interval '99 days' end
from generate_series(1, 12) n returning id, status, completed_at
"""
STRAY_ROWS: Final = """
insert into pmqd.jobs (id, queue_name, payload, status, ready, completed_at)
select gen_random_uuid(), 'a', '1', case n % 6 when 0 then 'queued' else 'completed' end, n % 6 = 0,
  case when n % 6 <> 0 then now() - interval '101 days' end
from generate_series(1, 30) n returning id, status, completed_at
"""


class Keeper:
    """The process of tests/sweep_keeper.py, which does one thing at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.sweep_keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=clean_environ(),
            text=True,
        )

    def start(self, order: Order) -> psutil.Process:
        """One more thing is begun."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asdict(order)) + "\n")
        self.process.stdin.flush()
        return psutil.Process(int(self._line()))

    def wait(self) -> int:
        """How it ended."""
        return int(self._line())

    def do(self, what: str, dsn: str) -> int:
        """Begin and end."""
        self.start(Order(what, dsn))
        return self.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        """The process ends with its orders."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@dataclass
class Place:
    """One database, and what must be in it at the end.

    Attributes:
        servers: where it is.
        dsn: its address.
        wire: a proxy on the way to it.
        kept: the jobs that must stay.
        failed: the jobs that are to be replayed.
    """

    servers: Servers
    dsn: str
    wire: Proxy
    kept: set[UUID] = field(default_factory=set)
    failed: list[UUID] = field(default_factory=list)

    def rows(self, text: str, *values: Any) -> list[tuple[Any, ...]]:
        """What a statement returns; on a connection of its own, as the server may have been killed."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return connection.execute(text, values).fetchall()


@pytest.fixture(scope="module")
def keeper() -> Iterator[Keeper]:
    """Who carries out orders."""
    with contextlib.closing(Keeper()) as made:
        yield made


@pytest.fixture(scope="module")
def wire(servers: Servers) -> Iterator[Proxy]:
    """The way to PostgreSQL."""
    with contextlib.closing(Proxy(servers.postgres)) as made:
        yield made


@pytest.fixture(scope="module")
def filled(servers: Servers) -> str:
    """A database with a month to make, one to retire, rows to clean and failed jobs to replay."""
    dsn = servers.postgres.create_database(TEMPLATE, "template_sweep")
    with psycopg.connect(dsn, autocommit=True) as connection:
        for step in ("make_partition", "attach_partition"):
            connection.execute(AN_OLD_MONTH.format(step=step))
        for parent in ("jobs", "job_logs"):
            [name] = connection.execute(
                "select pmqd.partition_name(%s, (date_trunc('month', now() at time zone 'utc') + interval '2 months')::date)",
                (parent,),
            ).fetchone() or [""]
            connection.execute(f"alter table pmqd.{parent} detach partition pmqd.{name}")
            connection.execute(f"drop table pmqd.{name}")
        connection.execute(OLD_ROWS)
        connection.execute(STRAY_ROWS)
        connection.execute(
            "insert into pmqd.jobs (queue_name, payload, status, ready, failed_at, attempt_count)"
            " select 'trial', '1', 'failed', false, now() - n * interval '1 second', 3 from generate_series(1, %s) n",
            (FAILED,),
        )
        connection.execute("insert into pmqd.job_queues (name) values ('trial') on conflict do nothing")
    return TEMPLATE


@pytest.fixture
def place(servers: Servers, filled: str, wire: Proxy) -> Iterator[Place]:
    """A copy of it for one pair."""
    name = f"keeper_{next(_numbers)}"
    made = Place(servers, servers.postgres.create_database(name, filled), wire)
    made.kept = {
        row[0]
        for row in made.rows(
            "select id from pmqd.jobs where completed_at is null or completed_at > now() - interval '100 days'"
        )
    }
    made.failed = [row[0] for row in made.rows("select id from pmqd.jobs where status = 'failed'")]
    yield made
    servers.postgres.start()
    servers.postgres.drop_database(name)


def strike(keeper: Keeper, place: Place, point: str, fault: str) -> int:
    """Brings a process to the point and applies the fault there; how the process ended."""
    flag = place.servers.folder / point
    flag.touch()
    how = fault if fault in PROCESS_FAULTS else "stop"
    what = point.partition(".")[0]
    process = keeper.start(Order(what, place.wire.dsn(place.dsn), f"{point}={how}@{flag}"))
    wait_until(lambda: not flag.exists(), 20, f"somebody at {point}")
    if how == "stop":
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED, 10, "a process that stands there")
        _FAULTS[fault](place)
        process.resume()
    if fault == "postgres_killed":
        place.servers.postgres.start()
    return keeper.wait()


def _stand(place: Place) -> None:
    """What failed again since the replay began is not taken a second time by it."""
    place.rows(
        "update pmqd.jobs set status = 'failed', ready = false, failed_at = now() where id = ("
        " select id from pmqd.jobs where queue_name = 'trial' and status = 'queued' limit 1) returning id"
    )
    time.sleep(STANDS_SECONDS)


def _end_backends(place: Place) -> None:
    ended = place.rows(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name like 'pmqd:%%' and datname = current_database()"
    )
    assert ended, "no session was there to be ended"


_FAULTS: Final[dict[str, Callable[[Place], None]]] = {
    "stop": _stand,
    "backends": _end_backends,
    "postgres_killed": lambda place: place.servers.postgres.kill(),
    "reset": lambda place: place.wire.reset(),
}


def kept_in_order(place: Place) -> bool:
    """Whether a round has done all that it was to do."""
    rows = place.rows("select parent, month, (now() at time zone 'utc')::date from pmqd.partitions")
    months = [(parent, month) for parent, month, today in rows if month >= today.replace(day=1)]
    left = {row[0] for row in place.rows("select id from pmqd.jobs")}
    assert place.kept <= left, f"{len(place.kept - left)} jobs are gone that were to stay"
    return len(months) == len(rows) == 6 and left == place.kept


KEEPER_PAIRS: Final = pairs(*PROCESS_FAULTS, *POSTGRES_FAULTS, "reset", where="keeper")


@pytest.mark.parametrize(
    ("point", "fault"), [pair for pair in KEEPER_PAIRS if pair[0].startswith("retention.")]
)
def test_retention(keeper: Keeper, place: Place, point: str, fault: str) -> None:
    """No job is lost that is to stay; the next round, or the struck one itself, ends the work, and the schema is as it should be."""
    ended = strike(keeper, place, point, fault)
    assert ended == {"kill": -9, "exit": 1, "stop": 0}.get(fault, ended)

    def done() -> bool:
        # The session of a killed process may live for a moment, and its lock with it: then a round does nothing.
        assert keeper.do("retention", place.dsn) == 0
        return kept_in_order(place)

    wait_until(done, 20, "the partitions in order")
    schema.check(place.dsn)
    assert place.rows("select conname from pg_constraint where conname like 'hold%%'") == []


@pytest.mark.parametrize(("point", "fault"), [pair for pair in KEEPER_PAIRS if pair[0].startswith("replay.")])
def test_replay(keeper: Keeper, place: Place, point: str, fault: str) -> None:
    """Each failed job has begun its new life or waits for the next replay; none is lost, and none is replayed twice by one."""
    ended = strike(keeper, place, point, fault)
    assert ended == {"kill": -9, "exit": 1, "stop": 0}.get(fault, ended)
    counts = dict(
        place.rows("select status, count(*) from pmqd.jobs where queue_name = 'trial' group by status")
    )
    assert counts.keys() <= {"queued", "failed"}
    assert counts["queued"] >= BATCH - (fault == "stop")
    if fault == "stop":
        assert counts == {"queued": FAILED - 1, "failed": 1}
    assert keeper.do("replay", place.dsn) == 0
    rows = place.rows("select id, status, attempt_count from pmqd.jobs where queue_name = 'trial'")
    assert sorted(rows) == sorted((job_id, "queued", 0) for job_id in place.failed)


def test_two_replays_at_once_share_the_jobs(keeper: Keeper, place: Place) -> None:
    """While one stands between two batches another replays all: the first one finds nothing left, and takes nothing again."""
    flag = place.servers.folder / "two"
    flag.touch()
    process = keeper.start(Order("replay", place.dsn, f"replay.replayed=stop@{flag}"))
    wait_until(lambda: process.status() == psutil.STATUS_STOPPED, 10, "a replay that stands")
    other = Keeper()
    thread = threading.Thread(target=other.do, args=("replay", place.dsn))
    thread.start()
    thread.join(20)
    place.rows(
        "update pmqd.jobs set status = 'failed', ready = false, failed_at = now() where id = any(%s) returning id",
        place.failed,
    )
    process.resume()
    assert keeper.wait() == 0
    other.close()
    assert place.rows("select distinct status from pmqd.jobs where queue_name = 'trial'") == [("failed",)]
