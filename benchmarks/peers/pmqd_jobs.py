"""pmqd: plain and async handlers; producers by plain SQL and by the client with its bypass."""

import os

import psycopg

from benchmarks.peers import slots
from pmqd import App

QUEUE = "bench"
HIGH, NORMAL = 10, 100
"""Priorities of these bands."""
_INSERT = (
    "insert into pmqd.jobs (queue_name, kind, priority, payload)"
    " select %s, 'job', %s, jsonb_build_object('number', n, 'text', %s::text) from generate_series(%s::int, %s::int) n"
)

app = App()


@app.task(queue=QUEUE, name="job")
def job(number: int, text: str = "") -> None:  # noqa: ARG001 - it is there to be carried
    """One job of the benchmark."""
    slots.work(number)


@app.task(queue=QUEUE, name="job-async")
async def job_async(number: int, text: str = "") -> None:  # noqa: ARG001 - as above
    """The same as a coroutine."""
    await slots.work_async(number)


def produce() -> None:
    """One plain SQL insert at a time, each committed by itself."""
    _produce(NORMAL)


def produce_high() -> None:
    """The same in the high band."""
    _produce(HIGH)


def _produce(priority: int) -> None:
    with psycopg.connect(os.environ["BENCH_POSTGRES"], autocommit=True) as connection:
        for first in slots.paced():
            count = min(slots.BATCH, slots.PACED - first)
            connection.execute(_INSERT, (QUEUE, priority, slots.TEXT, first, first + count - 1))
            slots.enqueued(first, count)


def produce_bypass() -> None:
    """Through the client, which tells Redis itself after the commit. PMQD_POSTGRES__DSN and PMQD_REDIS__URL say where."""
    for number in slots.paced():
        app.enqueue(QUEUE, {"number": number, "text": slots.TEXT}, kind="job", priority=HIGH)
        slots.enqueued(number)
    app.close()
