"""Producers on an event loop against a real PostgreSQL."""

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from pmqd import App, EnqueueError, StoreUnavailable
from pmqd.config import PostgresSettings, RedisSettings, Settings
from pmqd.embedded import PostgresServer
from tests.fix_proxy import MakeProxy
from tests.fix_servers import WaitUntil

ARGUMENTS: dict[str, Any] = {"campaign": UUID(int=5), "to": "ada@example.org"}


def send(campaign: UUID, to: str) -> None:
    """What the tests' task does not do."""


def app_on(dsn: str) -> App:
    """An application on this database, with one task."""
    app = App(Settings(postgres=PostgresSettings(dsn=dsn), redis=RedisSettings()))
    app.task(queue="mail", name="send")(send)
    return app


@pytest.fixture
def app(database: str) -> Iterator[App]:
    """An application on a fresh database."""
    made = app_on(database)
    yield made
    made.close()


@pytest.fixture
def look(database: str) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A connection that looks."""
    with psycopg.connect(database, autocommit=True, row_factory=dict_row) as connection:
        yield connection


def count(look: Any) -> int:
    """How many jobs there are."""
    return int(look.execute("select count(*) from pmqd.jobs").fetchone()["count"])


def test_one_and_many(app: App, look: Any) -> None:
    """Each of the asynchronous ways writes its rows over own connections, many at once too."""

    async def main() -> list[UUID]:
        task = app.registry.tasks["send"]
        ids = [await task.enqueue_async(**ARGUMENTS), await app.enqueue_async("q", 1, priority=9)]
        ids += await task.enqueue_many_async([ARGUMENTS, {**ARGUMENTS, "_options": {"id": uuid4()}}])
        ids += await asyncio.gather(*(app.enqueue_async("q", n) for n in range(40)))
        return ids

    ids = asyncio.run(main())
    assert len(set(ids)) == count(look) == 44


def test_several_loops_one_after_the_other(app: App, look: Any) -> None:
    """An application outlives event loops: each gets connections of its own, none is left open."""
    for n in range(5):
        asyncio.run(app.enqueue_async("q", n))
    assert count(look) == 5


def test_a_callers_connection_decides(app: App, database: str, look: Any) -> None:
    """Rolled back, the jobs never were; committed, they are. Connection and cursor."""

    async def main() -> None:
        task = app.registry.tasks["send"]
        async with await psycopg.AsyncConnection.connect(database) as conn:
            await task.enqueue_async(**ARGUMENTS, conn=conn)
            await task.enqueue_many_async([ARGUMENTS, ARGUMENTS], conn=conn)
            await conn.rollback()
            assert count(look) == 0
            async with conn.cursor() as cursor:
                await task.enqueue_async(**ARGUMENTS, conn=cursor)
            assert count(look) == 0
        async with await psycopg.AsyncConnection.connect(database, autocommit=True) as conn:
            await task.enqueue_many_async([ARGUMENTS, ARGUMENTS], conn=conn)

    asyncio.run(main())
    assert count(look) == 3


def test_sqlalchemy(app: App, database: str, look: Any) -> None:
    """An AsyncSession's or AsyncConnection's transaction carries the job."""
    pytest.importorskip("greenlet", reason="SQLAlchemy's asyncio part needs greenlet")
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    async def connect() -> Any:
        return await psycopg.AsyncConnection.connect(database)

    async def main() -> None:
        engine = create_async_engine("postgresql+psycopg://", async_creator=connect)
        task = app.registry.tasks["send"]
        async with AsyncSession(engine) as session:
            await task.enqueue_async(**ARGUMENTS, conn=session)
            await session.rollback()
            await task.enqueue_many_async([ARGUMENTS, ARGUMENTS], conn=session)
            await session.commit()
        async with engine.begin() as connection:
            await task.enqueue_async(**ARGUMENTS, conn=connection)
        await engine.dispose()

    asyncio.run(main())
    assert count(look) == 3


def test_the_wrong_sort_of_connection(app: App, database: str, look: Any) -> None:
    """A connection of the other world is named as such, and nothing is written."""
    with (
        psycopg.connect(database) as conn,
        pytest.raises(EnqueueError, match="AsyncConnection or AsyncCursor"),
    ):
        asyncio.run(app.enqueue_async("q", 1, conn=conn))

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(database) as conn:
            with pytest.raises(EnqueueError, match=r"await enqueue_async"):
                app.enqueue("q", 1, conn=conn)

    asyncio.run(main())
    assert count(look) == 0


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("many", [False, True])
def test_a_lost_connection_is_tried_once_more(
    postgres: PostgresServer, database: str, look: Any, proxy: MakeProxy, when: Any, many: bool
) -> None:
    """Whether the server had committed or not when the wire broke: one row each, no error, no double. Prepared or not."""
    wire = proxy(postgres)
    app = app_on(wire.dsn(database))

    async def main(before: int) -> None:
        for n in range(before):
            await app.enqueue_async("q", n)
        wire.break_on(b"COMMIT" if many else b"lost", when)
        if many:
            await app.registry.tasks["send"].enqueue_many_async([ARGUMENTS] * 5)
        else:
            await app.enqueue_async("lost", 1)

    asyncio.run(main(1))
    assert wire.sprung == 1
    asyncio.run(main(10))
    assert wire.sprung == 2
    assert count(look) == (21 if many else 13)
    app.close()


def test_postgres_away(postgres: PostgresServer, database: str, proxy: MakeProxy) -> None:
    """The error is pmqd's, with the id in it when nobody knows what became of the job."""
    wire = proxy(postgres)
    app = app_on(wire.dsn(database))

    async def main() -> None:
        await app.enqueue_async("q", 1)
        wire.cut()
        with pytest.raises(StoreUnavailable, match="PostgreSQL at"):
            await app.enqueue_async("q", 2)

    asyncio.run(main())
    app.close()


def test_a_cancelled_enqueue_leaves_nothing_behind(app: App, look: Any, wait_until: WaitUntil) -> None:
    """A task that is cancelled in the middle ends its connection; the next enqueue works."""

    async def main() -> None:
        look.execute("begin")
        look.execute("lock table pmqd.jobs in access exclusive mode")
        waiting = asyncio.create_task(app.enqueue_async("q", 1))
        await asyncio.to_thread(
            wait_until,
            lambda: look.execute("select from pg_locks where not granted").fetchall(),
            what="the lock awaited",
        )
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        look.execute("rollback")
        await app.enqueue_async("q", 2)

    asyncio.run(main())
    assert count(look) == 1
