"""PgBouncer in transaction mode: everything but the leading migrator goes through it, and nothing leaks between sessions."""

import asyncio
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from pmqd.client import App
from pmqd.config import PostgresSettings, Settings
from pmqd.connections import AsyncConnections, Connections
from pmqd.embedded import PostgresServer
from pmqd.errors import ConfigError, StoreUnavailable
from pmqd.job import Action
from pmqd.store import Store
from tests.fix_daemon import MakeDaemon
from tests.fix_postgres_ha import MakePgBouncer, PgBouncer
from tests.fix_servers import WaitUntil
from tests.store_tools import open_bench, outcome

JOBS = 1000


@pytest.fixture
def pooler(pgbouncer: MakePgBouncer, own_postgres: PostgresServer) -> PgBouncer:
    """PgBouncer before this test's own server."""
    return pgbouncer(own_postgres)


@pytest.fixture
def postgres_settings(pooler: PgBouncer, own_postgres: PostgresServer) -> dict[str, Any]:
    """As in the file: both ways."""
    return {"dsn": pooler.dsn("pmqd"), "direct_dsn": own_postgres.dsn("pmqd")}


def counts(connection: psycopg.Connection[Any]) -> dict[str, int]:
    """Jobs by status."""
    return dict(connection.execute("select status, count(*)::int from pmqd.jobs group by 1").fetchall())


def produce(app: App) -> None:
    """The three ways to enqueue, each more often than psycopg waits until it prepares a statement."""

    @app.task(queue="trial", name="nap")
    def nap(seconds: float) -> None:
        raise NotImplementedError

    async def some() -> None:
        for _ in range(20):
            await nap.enqueue_async(seconds=0.002)

    for _ in range(20):
        nap.enqueue(seconds=0.002)
    asyncio.run(some())
    for _ in range(20):
        nap.enqueue_many([{"seconds": 0.002}] * ((JOBS - 40) // 20))
    app.close()


def test_a_thousand_jobs_and_a_killed_worker(
    postgres_settings: dict[str, Any],
    own_postgres: PostgresServer,
    redis_url: str,
    daemon: MakeDaemon,
    wait_until: WaitUntil,
) -> None:
    """Producers and the daemon through the pooler, a worker killed in the middle: every job is done, none twice by a settle."""
    pool = {"app": "tests.applications.trial:app", "processes": 2, "concurrency": 1}
    running = daemon({"postgres": postgres_settings, "redis": {"url": redis_url}, "workers": [pool]})
    produce(App(Settings(postgres=PostgresSettings(**postgres_settings))))
    with psycopg.connect(own_postgres.dsn("pmqd"), autocommit=True) as connection:
        wait_until(lambda: counts(connection).get("completed", 0) > JOBS // 10, 60, "a tenth is done")
        running.children("worker")[0].kill()
        wait_until(lambda: counts(connection) == {"completed": JOBS}, 90, "all are done")
        twice = "select count(*) from (select from pmqd.job_logs where status = 'success' group by job_id having count(*) > 1) d"
        assert connection.execute(twice).fetchone() == (0,)
        direct = connection.execute(
            "select array_agg(distinct application_name) from pg_stat_activity where application_name like 'pmqd:%'"
            " and pid in (select pid from pg_locks where locktype = 'advisory')"
        ).fetchone()
        assert direct == (["pmqd:migrator"],)
    assert "prepared statement" not in running.log


def test_producers_prepare_nothing_there(pooler: PgBouncer, own_postgres: PostgresServer) -> None:
    """Own connections find out by themselves whether they may prepare, without `direct_dsn`."""
    with Connections(PostgresSettings(dsn=pooler.dsn("pmqd"))).one() as through:
        assert through.prepare_threshold is None
    with Connections(PostgresSettings(dsn=own_postgres.dsn("pmqd"))).one() as past:
        assert past.prepare_threshold == 5

    async def thresholds() -> list[int | None]:
        found = []
        for server in (pooler, own_postgres):
            async with AsyncConnections(PostgresSettings(dsn=server.dsn("pmqd"))).one() as own:
                found.append(own.prepare_threshold)
        return found

    assert asyncio.run(thresholds()) == [None, 5]


def test_guards_come_with_each_transaction(postgres_settings: dict[str, Any], pooler: PgBouncer) -> None:
    """The store's statements have their timeouts and plans through the pooler; another client of it finds none of them."""
    store = Store(PostgresSettings(**postgres_settings, statement_timeout_seconds=0.3), "test")
    names = (
        "statement_timeout",
        "lock_timeout",
        "idle_in_transaction_session_timeout",
        "enable_seqscan",
        "jit",
    )
    ask = "select " + ", ".join(f"current_setting('{name}')" for name in names)
    found = store.attempt(lambda connection: connection.execute(ask).fetchone())
    assert found == ("300ms", "1500ms", "10s", "off", "off")
    with pytest.raises(StoreUnavailable, match="statement timeout"):
        store.attempt(lambda connection: connection.execute("select pg_sleep(5)").fetchone())
    with psycopg.connect(pooler.dsn("pmqd"), autocommit=True, prepare_threshold=None) as other:
        for _ in range(20):
            assert other.execute("show statement_timeout").fetchone() == ("0",)
            assert other.execute("show enable_seqscan").fetchone() == ("on",)
    store.close()


def test_the_stores_statements(postgres_settings: dict[str, Any], pooler: PgBouncer) -> None:
    """Claim, steal, settle with the next claim in one transaction, and rescue, more often than psycopg waits to prepare."""
    with open_bench(pooler.server.dsn("pmqd")) as bench:
        bench.store.close()
        bench.store = Store(PostgresSettings(**postgres_settings), "test")
        for _ in range(12):
            first, second = bench.insert(2)
            claimed = bench.claim([first])
            [job] = claimed
            statuses, won = bench.store.settle_and_claim(
                [outcome(job, Action.COMPLETE)],
                [job.token],
                [second],
                token=uuid4(),
                worker_id="w",
                instance_id=bench.instance_id,
            )
            assert statuses == {first: "completed"}
            assert [each.id for each in won] == [second]
        bench.store.close()


def test_leading_through_a_pooler_is_refused(pooler: PgBouncer) -> None:
    """Whoever names the pooler as the direct way is told so, with the name of the setting."""
    settings = PostgresSettings(dsn=pooler.server.dsn("pmqd"), direct_dsn=pooler.dsn("pmqd"))
    store = Store(settings, "migrator", direct=True)
    with pytest.raises(ConfigError, match=r"unsupported startup parameter.*set postgres.direct_dsn"):
        store.lead()


def test_a_pooler_that_ignores_the_guards_is_found_out(
    pgbouncer: MakePgBouncer, own_postgres: PostgresServer
) -> None:
    """With ignore_startup_parameters = options nothing fails at once: the migrator refuses all the same, others adapt."""
    pooler = pgbouncer(own_postgres, ignore_startup_parameters="options")
    settings = PostgresSettings(dsn=pooler.dsn("pmqd"))
    with pytest.raises(ConfigError, match=r"is a connection pooler.*Set postgres.direct_dsn"):
        Store(settings, "migrator", direct=True).lead()
    store = Store(settings, "web")
    for _ in range(20):
        assert store.attempt(lambda connection: connection.execute("show jit").fetchone()) == ("off",)
    store.close()


def test_the_daemon_says_which_setting_is_missing(
    pooler: PgBouncer, redis_url: str, daemon: MakeDaemon, wait_until: WaitUntil
) -> None:
    """A pooler as postgres.dsn and nothing else: the daemon ends with the configuration's exit code and one clear line."""
    running = daemon({"postgres": {"dsn": pooler.dsn("pmqd")}, "redis": {"url": redis_url}}, wait=False)
    wait_until(lambda: running.process.poll() is not None, 60, "the daemon ends")
    assert running.process.returncode == 78
    assert "set postgres.direct_dsn to the way past it" in running.log
