"""`idle`: what it costs to wait for work."""

import time
from functools import partial
from typing import Any, Self

import psycopg
import redis

from benchmarks.peers.arena import Arena, private
from benchmarks.peers.field import FIELD
from benchmarks.usage import pss_mb, used
from benchmarks.works.work import Figures, Scale, Work, running

SECONDS = 60.0
CALM_SECONDS = 10.0
"""After the workers are ready: what follows a start is over."""


def measure(name: str, scale: Scale) -> Figures:
    """One contestant without any job."""
    contestant, seconds = FIELD[name], scale.seconds_or(SECONDS)
    with private(1, settings={"shared_preload_libraries": "pg_stat_statements"}) as arena:
        contestant.prepare(arena)
        arena.settled()
        with running(contestant, arena) as workers, _Requests(arena) as requests:
            workers.wait_idle()
            time.sleep(min(CALM_SECONDS, seconds))
            before, asked = used(arena, workers), requests.count()
            time.sleep(seconds)
            cost, asked_later = used(arena, workers) - before, requests.count()
            memory = pss_mb(workers.pids())
            workers.check()
    minutes = seconds / 60
    return [
        ("CPU s of the workers a minute", cost.workers / minutes),
        ("CPU s of PostgreSQL a minute", cost.postgres / minutes),
        ("CPU s of Redis a minute", cost.redis / minutes),
        ("PostgreSQL statements/s", (asked_later[0] - asked[0]) / seconds),
        ("Redis commands/s", (asked_later[1] - asked[1] - 1) / seconds),  # one of them was ours
        ("PSS MB of all processes", memory),
    ]


class _Requests:
    """What the servers have been asked by the contestant; from another database, whose statements do not count."""

    def __init__(self, arena: Arena) -> None:
        self._postgres: psycopg.Connection[Any] = psycopg.connect(arena.postgres.dsn(), autocommit=True)
        self._postgres.execute("create extension pg_stat_statements")
        self._redis = redis.Redis.from_url(arena.redis.url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._postgres.close()
        self._redis.close()

    def count(self) -> tuple[int, int]:
        """Statements and commands so far."""
        row = self._postgres.execute(
            "select coalesce(sum(calls), 0)::bigint from pg_stat_statements"
            " where dbid = (select oid from pg_database where datname = 'bench')"
        ).fetchone()
        info: Any = self._redis.info("stats")
        assert row is not None
        return row[0], info["total_commands_processed"]


_PEERS = ("graphile-worker", "pgqueuer", "celery", "dramatiq", "bullmq", "procrastinate")
IDLE = Work(
    "idle",
    f"no jobs for {SECONDS:g} s; the workers are all processes, pmqd's whole daemon; commands within Redis scripts count",
    {name: partial(measure, name) for name in ("pmqd", *_PEERS)},
)
