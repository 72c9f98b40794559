"""The producers of chaos runs: what they acknowledge is there, once; what they leave open may be there or not."""

import threading
import time
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import redis

from pmqd.chaos import checks_history, history
from pmqd.chaos.checks_job import Asked, asked
from pmqd.chaos.plan import Plan
from pmqd.chaos.producer import run_producers
from pmqd.embedded import PostgresServer
from tests.fix_servers import WaitUntil

pytestmark = pytest.mark.timeout(300)


def produce(
    folder: Path,
    dsn: str,
    direct: str,
    redis_url: str,
    jobs: int,
    faults: int = 0,
    stop: threading.Event | None = None,
) -> None:
    """Runs the producers to their end."""
    run_producers(
        Plan(jobs=jobs, faults=faults, seed=5, folder=folder),
        folder=folder,
        dsn_wire=dsn,
        dsn_direct=direct,
        redis_wire=redis_url,
        schema="pmqd",
        prefix="",
        stop=stop or threading.Event(),
    )


def recorded(folder: Path) -> dict[bytes, Asked]:
    """What the producers wrote down, by the job's id."""
    found: dict[bytes, list[bytes]] = {}
    for line in checks_history.lines_by_job(sorted((folder / "history").glob("producers-*"))):
        found.setdefault(line[2:38], []).append(line)
    return {job_id: asked(lines) for job_id, lines in found.items()}


def in_table(dsn: str) -> dict[bytes, str]:
    """All jobs: id and status."""
    with psycopg.connect(dsn) as connection:
        rows = connection.execute("select id::text, status from pmqd.jobs").fetchall()
    return {job_id.encode(): status for job_id, status in rows}


def acknowledged(folder: Path) -> set[bytes]:
    """The ids that were acknowledged."""
    return {job_id for job_id, wish in recorded(folder).items() if wish.acknowledged}


@pytest.fixture
def chaos_database(database: str) -> str:
    """A database with the trigger."""
    with psycopg.connect(database, autocommit=True) as connection:
        history.install(connection, "pmqd")
    return database


def test_every_way_leaves_what_it_acknowledged(
    chaos_database: str, redis_url: str, short_folder: Path
) -> None:
    """As many as were ordered, each a row, of every kind and in every queue; cancels are asked for; what the client may have
    told Redis by itself is noted.
    """
    with redis.Redis.from_url(redis_url) as client:
        client.set("pmqd:epoch", str(uuid4()))  # a migrator has been here: else no client pushes
    produce(short_folder, chaos_database, chaos_database, redis_url, 600)
    known, rows = acknowledged(short_folder), in_table(chaos_database)
    assert len(known) >= 600
    assert known == set(rows)
    wishes = recorded(short_folder)
    with redis.Redis.from_url(redis_url) as client:
        hints = {hint for key in client.scan_iter("queue:*") for hint in client.lrange(key, 0, -1)}
    assert hints, "the client tells Redis of high-band jobs"
    assert hints <= {job_id for job_id, wish in wishes.items() if wish.hinted}
    assert any(wish.priority <= 50 and not wish.hinted for wish in wishes.values()), (
        "COPY and SQL tell nobody"
    )
    assert all(wish.priority <= 50 for wish in wishes.values() if wish.hinted)
    queues = {wish.queue for wish in wishes.values()}
    assert queues >= {"chaos-mail", "chaos-bulk", "chaos-plain", "chaos-async", "chaos-mixed"}
    assert "cancelled" in rows.values()


def test_the_load_lasts_as_long_as_its_faults(
    chaos_database: str, redis_url: str, short_folder: Path
) -> None:
    """Few jobs and some faults: the jobs are spread over the time that the faults take."""
    began = time.monotonic()
    produce(short_folder, chaos_database, chaos_database, redis_url, 50, faults=5)
    assert time.monotonic() - began >= 5 * 0.7


def test_a_producer_is_stopped(
    chaos_database: str, redis_url: str, short_folder: Path, wait_until: WaitUntil
) -> None:
    """Told to stop it ends soon, whatever it still had to do."""
    stop = threading.Event()
    given = (short_folder, chaos_database, chaos_database, redis_url, 5000, 1000, stop)
    thread = threading.Thread(target=produce, args=given)
    thread.start()
    wait_until(lambda: len(acknowledged(short_folder)) > 5, 60, "the first acknowledged jobs")
    stop.set()
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def outage(own_postgres: PostgresServer) -> PostgresServer:
    """A server that the test may stop, with the trigger."""
    with psycopg.connect(own_postgres.dsn("pmqd"), autocommit=True) as connection:
        history.install(connection, "pmqd")
    return own_postgres


def test_postgres_goes_away_and_comes_back(
    outage: PostgresServer, redis_url: str, short_folder: Path, wait_until: WaitUntil
) -> None:
    """A crash in the middle: the producers go on afterwards, all that was acknowledged is there, and nothing that nobody asked for."""
    dsn = outage.dsn("pmqd")
    folder = short_folder / "run"
    thread = threading.Thread(target=produce, args=(folder, dsn, dsn, redis_url, 800, 8))
    folder.mkdir()
    thread.start()
    wait_until(lambda: len(acknowledged(folder)) > 100, 60, "a hundred acknowledged jobs")
    outage.restart("immediate")
    thread.join(120)
    assert not thread.is_alive()
    known, rows = acknowledged(folder), in_table(dsn)
    assert len(known) >= 800
    assert known <= set(rows)
    assert set(rows) <= set(recorded(folder))
    assert not {job_id for job_id, wish in recorded(folder).items() if wish.refused} & set(rows)
