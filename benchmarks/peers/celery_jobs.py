"""Celery: `celery -A celery_jobs worker`, early acknowledgement and prefetch 4 (its defaults), no results."""

import os

import slots
from celery import Celery

app = Celery("bench", broker=os.environ["BENCH_REDIS"])
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)


@app.task(name="job")
def job(number: int, text: str) -> None:  # noqa: ARG001 - it is there to be carried
    """One job of the benchmark."""
    slots.work(number)


def fill() -> None:
    """Enqueues all jobs."""
    _send(range(slots.JOBS))


def produce() -> None:
    """Enqueues each job at its time."""
    _send(slots.paced())


def _send(numbers: object) -> None:
    with app.connection_for_write() as connection:
        producer = app.amqp.Producer(connection)
        for number in numbers:
            job.apply_async((number, slots.TEXT), producer=producer)
            slots.enqueued(number)
