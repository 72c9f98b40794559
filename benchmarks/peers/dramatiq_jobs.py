"""Dramatiq: `dramatiq -p 2 -t 4 dramatiq_jobs`."""

import os

import dramatiq
import slots
from dramatiq.brokers.redis import RedisBroker

dramatiq.set_broker(RedisBroker(url=os.environ["BENCH_REDIS"]))


@dramatiq.actor
def job(number: int, text: str) -> None:  # noqa: ARG001 - it is there to be carried
    """One job of the benchmark."""
    slots.work(number)


def fill() -> None:
    """Enqueues all jobs."""
    for number in range(slots.JOBS):
        job.send(number, slots.TEXT)


def produce() -> None:
    """Enqueues each job at its time."""
    for number in slots.paced():
        job.send(number, slots.TEXT)
        slots.enqueued(number)
