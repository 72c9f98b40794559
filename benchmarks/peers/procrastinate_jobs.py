"""Procrastinate: `procrastinate --app=procrastinate_jobs.app worker -c 10 --delete-jobs never`, on psycopg."""

import asyncio
import os

import procrastinate
import slots

app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=os.environ["BENCH_POSTGRES"]))
CHUNK = 1000


@app.task(name="job", queue="bench")
async def job(number: int, text: str) -> None:  # noqa: ARG001 - it is there to be carried
    """One job of the benchmark."""
    await slots.work_async(number)


def prepare() -> None:
    """Makes the schema."""
    asyncio.run(_prepare())


def fill() -> None:
    """Makes the schema and enqueues all jobs."""
    asyncio.run(_fill())


def produce() -> None:
    """Enqueues each job at its time."""
    asyncio.run(_produce())


async def _prepare() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def _fill() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for first in range(0, slots.JOBS, CHUNK):
            numbers = range(first, min(first + CHUNK, slots.JOBS))
            await job.batch_defer_async(*({"number": number, "text": slots.TEXT} for number in numbers))


async def _produce() -> None:
    async with app.open_async():
        for number in slots.paced():
            await job.defer_async(number=number, text=slots.TEXT)
            slots.enqueued(number)
