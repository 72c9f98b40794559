"""PgQueuer on asyncpg and uvloop: `PgQueuer.run(batch_size=100)`; jobs that sleep: `batch_size=25, max_concurrent_tasks=50`."""

import asyncio
import os
from datetime import timedelta

import asyncpg
import slots
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

CHUNK = 20_000


def work() -> None:
    """Runs one worker process."""
    uvloop.install()
    asyncio.run(_work())


def prepare() -> None:
    """Makes the schema."""
    asyncio.run(_prepare())


def fill() -> None:
    """Makes the schema and enqueues all jobs."""
    uvloop.install()
    asyncio.run(_fill())


def produce() -> None:
    """Enqueues each job at its time."""
    uvloop.install()
    asyncio.run(_produce())


async def _work() -> None:
    connection = await asyncpg.connect(os.environ["BENCH_POSTGRES"])
    queue = PgQueuer.from_asyncpg_connection(connection)

    @queue.entrypoint("job")
    async def job(job: Job) -> None:
        number, _, _text = (job.payload or b"0").partition(b" ")
        await slots.work_async(int(number))

    shape = {"batch_size": 25, "max_concurrent_tasks": 50} if slots.SLEEP else {"batch_size": 100}
    await queue.run(dequeue_timeout=timedelta(seconds=1), **shape)


async def _prepare() -> None:
    connection = await asyncpg.connect(os.environ["BENCH_POSTGRES"])
    await Queries(AsyncpgDriver(connection)).install()
    await connection.close()


async def _fill() -> None:
    connection = await asyncpg.connect(os.environ["BENCH_POSTGRES"])
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    for first in range(0, slots.JOBS, CHUNK):
        payloads = [_payload(number) for number in range(first, min(first + CHUNK, slots.JOBS))]
        await queries.enqueue(["job"] * len(payloads), payloads, [0] * len(payloads))
    await connection.close()


async def _produce() -> None:
    connection = await asyncpg.connect(os.environ["BENCH_POSTGRES"])
    queries = Queries(AsyncpgDriver(connection))
    for number in slots.paced():
        await queries.enqueue("job", _payload(number), 0)
        slots.enqueued(number)
    await connection.close()


def _payload(number: int) -> bytes:
    return f"{number} {slots.TEXT}".encode()
