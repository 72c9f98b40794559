"""PgQueuer: `PgQueuer.run(batch_size=25, max_concurrent_tasks=50)` on asyncpg and uvloop."""

import asyncio
import os
import sys
from datetime import timedelta

import asyncpg
import slots
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries


async def work() -> None:
    """Runs one worker process."""
    connection = await asyncpg.connect(os.environ["BENCH_POSTGRES"])
    queue = PgQueuer.from_asyncpg_connection(connection)

    @queue.entrypoint("job")
    async def job(job: Job) -> None:
        number = int(job.payload or b"0")
        slots.start(number)
        await asyncio.sleep(slots.SLEEP)
        slots.end(number)

    await queue.run(dequeue_timeout=timedelta(seconds=1), batch_size=25, max_concurrent_tasks=50)


async def fill() -> None:
    """Installs the schema and enqueues all jobs."""
    connection = await asyncpg.connect(os.environ["BENCH_POSTGRES"])
    queries = Queries(AsyncpgDriver(connection))
    await queries.install()
    numbers = list(range(slots.JOBS))
    await queries.enqueue(["job"] * len(numbers), [str(n).encode() for n in numbers], [0] * len(numbers))
    await connection.close()


if __name__ == "__main__":
    uvloop.install()
    asyncio.run(fill() if "fill" in sys.argv else work())
