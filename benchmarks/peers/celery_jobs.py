"""Celery: `celery -A celery_jobs worker -P threads -c 50`, early acknowledgement (its default)."""

import os
import time

import slots
from celery import Celery

app = Celery("bench", broker=os.environ["BENCH_REDIS"])
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)


@app.task(name="job")
def job(number: int) -> None:
    """One job of the benchmark."""
    slots.start(number)
    time.sleep(slots.SLEEP)
    slots.end(number)


if __name__ == "__main__":
    with app.connection_for_write() as connection, app.amqp.producer_pool.acquire():
        producer = app.amqp.Producer(connection)
        for number in range(slots.JOBS):
            job.apply_async((number,), producer=producer)
