"""Fixtures for the tests of one role alone (see roles.py): an instance, what it serves, its jobs, its counters.

Modules that want them say `pytest_plugins = ["tests.role_fixtures"]`.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import redis

from pmqd import metrics
from pmqd.arena import Arena
from pmqd.config import Settings
from pmqd.job import Claimed
from pmqd.maintenance import Maintenance
from pmqd.store import Store
from tests.roles import Connection, Insert, arena_for, context_for, settings_for


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """A client of the test's own for looking into Redis."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


@pytest.fixture
def settings(database: str, redis_url: str, tmp_path: Path) -> Settings:
    """An instance whose pool of two workers serves `q`."""
    return settings_for(database, redis_url, tmp_path)


@pytest.fixture
def serve(connection: Connection) -> Callable[..., UUID]:
    """Makes a live instance that serves these queues with two slots, as its maintenance would."""

    def make(*queues: str, slots: int = 2) -> UUID:
        instance_id = uuid4()
        pools = {"p": {"queues": list(queues), "processes": slots, "concurrency": 1}}
        connection.execute(
            "insert into pmqd.instances (id, host, pid, lease_tick, queues, pools)"
            " select %s, 'test', 1, tick, %s, %s from pmqd.ticker",
            (instance_id, list(queues), json.dumps(pools)),
        )
        return instance_id

    return make


@pytest.fixture
def insert(connection: Connection) -> Insert:
    """Inserts jobs, one per priority given, all in one statement; returns their ids."""

    def make(*priorities: int, queue: str = "q", delay: float = 0.0) -> list[UUID]:
        rows = connection.execute(
            "insert into pmqd.jobs (queue_name, payload, priority, run_at)"
            " select %s, '{}', p, now() + %s * interval '1 s' from unnest(%s::int[]) p returning id",
            (queue, delay, list(priorities)),
        ).fetchall()
        return [row[0] for row in rows]

    return make


@pytest.fixture
def store(settings: Settings) -> Iterator[Store]:
    """The statements of the workers that a test plays."""
    store = Store(settings.postgres, "test")
    yield store
    store.close()


@pytest.fixture
def arena() -> Arena:
    """The instance's arena."""
    return arena_for()


@pytest.fixture
def maintenance(settings: Settings, arena: Arena) -> Iterator[Maintenance]:
    """The instance's maintenance, registered, its rounds turned by the test."""
    maintenance = Maintenance(context_for("maintenance", settings, arena))
    maintenance.poll(time.monotonic())
    yield maintenance
    maintenance.close()


@pytest.fixture
def claim(connection: Connection, store: Store, arena: Arena) -> Callable[..., list[Claimed]]:
    """Inserts so many jobs and claims them for a worker, as one batch."""

    def make(worker_id: str, count: int = 1, **columns: object) -> list[Claimed]:
        names = "".join(f", {name}" for name in columns)
        places = "".join(f", %({name})s" for name in columns)
        rows = connection.execute(
            f"insert into pmqd.jobs (queue_name, payload{names}) select 'q', '{{}}'{places}"
            " from generate_series(1, %(count)s) returning id",
            columns | {"count": count},
        ).fetchall()
        claimed = store.claim(
            [row[0] for row in rows], token=uuid4(), worker_id=worker_id, instance_id=arena.instance_id
        )
        assert len(claimed) == count
        return claimed

    return make


@pytest.fixture
def counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the metric files, opened for this test."""
    monkeypatch.setattr(metrics, "_book", None)
    metrics.start(tmp_path / "metrics", "maintenance-0")
    yield tmp_path / "metrics"
    book = metrics._book
    assert book is not None
    book._counters.close()
    book._histograms.close()
