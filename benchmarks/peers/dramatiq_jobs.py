"""Dramatiq: `dramatiq -p 2 -t 50 dramatiq_jobs`."""

import os
import time

import dramatiq
import slots
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=os.environ["BENCH_REDIS"]))


@dramatiq.actor
def job(number: int) -> None:
    """One job of the benchmark."""
    slots.start(number)
    time.sleep(slots.SLEEP)
    slots.end(number)


if __name__ == "__main__":
    for number in range(slots.JOBS):
        job.send(number)
