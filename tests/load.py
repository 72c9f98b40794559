"""A producer at an even pace beside a daemon, and what became of its jobs."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from tests.fix_daemon import Daemon
from tests.history import enqueue, read, starts, statuses, until

RATE = 200
"""Jobs a second of the load."""


class Load(threading.Thread):
    """A producer: RATE jobs a second, one insert each, until stopped. What failed is not acknowledged, and not counted."""

    def __init__(self, dsn: str, most: int = 100_000) -> None:
        super().__init__(daemon=True)
        self.dsn, self.most = dsn, most
        self.enqueued: dict[str, float] = {}
        self._told = threading.Event()

    def run(self) -> None:
        """Enqueue at an even pace."""
        connection: psycopg.Connection[Any] | None = None
        begin = time.monotonic()
        for number in range(self.most):
            until(begin + number / RATE)
            if self._told.is_set():
                break
            try:
                connection = connection or psycopg.connect(self.dsn, autocommit=True, connect_timeout=2)
                job_id = enqueue(connection, "nothing")
                self.enqueued[str(job_id)] = time.monotonic()
            except psycopg.Error:
                connection = None
        if connection is not None:
            connection.close()

    def finish(self) -> None:
        """No more jobs."""
        self._told.set()
        self.join()


@contextmanager
def load(dsn: str) -> Iterator[Load]:
    """A load that ends with the block."""
    one = Load(dsn)
    one.start()
    try:
        yield one
    finally:
        one.finish()


def waits(history: Path, enqueued: dict[str, float]) -> list[float]:
    """Seconds from the acknowledged enqueue to the first start, per job."""
    first: dict[str, float] = {}
    for mark in read(history):
        if mark.mark == "S":
            first.setdefault(str(mark.job_id), mark.at)
    return [first[job_id] - at for job_id, at in enqueued.items() if job_id in first]


def has_grown(history: Path, count: int) -> bool:
    """Whether more starts than that are recorded."""
    return len(starts(history)) > count


def all_completed(dsn: str, one: Load) -> Callable[[], bool]:
    """Whether every acknowledged job (and perhaps an unacknowledged one) is completed."""

    def look() -> bool:
        try:
            with psycopg.connect(dsn, autocommit=True, connect_timeout=2) as connection:
                found = statuses(connection)
        except psycopg.Error:
            return False
        return set(found) == {"completed"} and found["completed"] >= len(one.enqueued)

    return look


def mode(running: Daemon) -> str:
    """The state that /healthz tells."""
    return str(running.get("/healthz").json()["status"])
