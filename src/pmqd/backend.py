"""The stores as the web child sees them: a few connections in threads, and figures that are kept for a while.

The event loop never waits for a store: calls run in threads, each with a connection of its own, and a page that
wants figures gets the last ones when the new ones take too long. So `/metrics` answers while both stores are away.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from pmqd.broker import Broker
from pmqd.config import Settings
from pmqd.errors import BrokerUnavailable, PmqdError, StoreUnavailable
from pmqd.job import BAND_RANGES
from pmqd.store import Store

T = TypeVar("T")

THREADS = 3
"""Connections to PostgreSQL at most."""
PATIENCE_SECONDS = 1.5
"""How long a page waits for new figures before it shows the old ones."""
BREAK_SECONDS = 1.0
"""After a failed call, how long further calls fail at once: callers do not queue up behind a connect timeout."""


@dataclass(frozen=True)
class Figures:
    """What the stores said about the queues.

    Attributes:
        queues: rows of `job_queues` with the depths beside their columns, by name.
        at: `time.monotonic()` of the answer.
    """

    queues: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    at: float = float("-inf")


@dataclass(frozen=True)
class RedisFigures:
    """What Redis said: list lengths by queue, and some of INFO. `up` is False when it did not answer."""

    lengths: Mapping[str, int] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    up: bool = False
    at: float = float("-inf")


class Backend:
    """Both stores for an asyncio program."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        self._redis_thread = ThreadPoolExecutor(1, thread_name_prefix="broker")
        self._mine = threading.local()
        self._stores: list[Store] = []
        self._broker = Broker(settings.redis, "web")
        self._broken_until = float("-inf")
        self._under_way = 0
        self._figures, self._figures_task = Figures(), _Flight[Figures]()
        self._redis, self._redis_task = RedisFigures(), _Flight[RedisFigures]()

    async def call(self, work: Callable[[Store], T]) -> T:
        """Runs a store call in a thread.

        Raises:
            StoreUnavailable: PostgreSQL is away, or was a moment ago.
        """
        self._under_way += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._call, work)
        finally:
            self._under_way -= 1

    def _call(self, work: Callable[[Store], T]) -> T:
        """In the thread, so that calls that queued up behind one that failed fail at once as well."""
        if time.monotonic() < self._broken_until:
            raise StoreUnavailable("PostgreSQL did not answer")
        try:
            return work(self._store())
        except StoreUnavailable:
            self._broken_until = time.monotonic() + BREAK_SECONDS
            raise

    async def figures(self, max_age: float) -> Figures:
        """The queues and their depths, not older than `max_age` seconds if PostgreSQL answers in time.

        Raises:
            StoreUnavailable: there has never been an answer.
        """
        if time.monotonic() - self._figures.at > max_age:
            await self._figures_task.join(self._read_figures)
        if self._figures.at == float("-inf"):
            raise StoreUnavailable("PostgreSQL did not answer")
        return self._figures

    async def redis_figures(self, max_age: float) -> RedisFigures:
        """List lengths and INFO of Redis, not older than `max_age` seconds; `up` False when it is away."""
        if time.monotonic() - self._redis.at > max_age:
            await self._redis_task.join(self._read_redis)
        return self._redis

    async def both_figures(self, max_age: float) -> tuple[Figures, RedisFigures]:
        """The last figures of both stores, asked for at once; what is away is old or empty there."""

        async def of_postgres() -> None:
            with suppress(StoreUnavailable):
                await self.figures(max_age)

        _, redis = await asyncio.gather(of_postgres(), self.redis_figures(max_age))
        return self._figures, redis

    def forget_figures(self) -> None:
        """Something was changed through this process: the next page reads anew."""
        self._figures = replace(self._figures, at=self._figures.at - 3600)  # -inf stays: never read

    def close(self) -> None:
        """Lets go of threads and connections; those of a call that hangs are left to die with the process."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._redis_thread.shutdown(wait=False, cancel_futures=True)
        if not self._under_way:
            for store in self._stores:
                store.close()
            self._broker.close()

    def _store(self) -> Store:
        store: Store | None = getattr(self._mine, "store", None)
        if store is None:
            store = self._mine.store = Store(self._settings.postgres, "web")
            self._stores.append(store)
        return store

    async def _read_figures(self) -> Figures:
        self._figures = await self.call(_queue_figures)
        return self._figures

    async def _read_redis(self) -> RedisFigures:
        names = list(self._figures.queues)
        loop = asyncio.get_running_loop()
        self._under_way += 1
        try:
            self._redis = await loop.run_in_executor(self._redis_thread, _redis_figures, self._broker, names)
        except BrokerUnavailable:
            self._redis = RedisFigures(at=time.monotonic())
        finally:
            self._under_way -= 1
        return self._redis


class _Flight(Generic[T]):
    """One reading at a time: who comes while it is under way waits for the same one, and not for ever."""

    def __init__(self) -> None:
        self._task: asyncio.Task[T] | None = None

    async def join(self, read: Callable[[], Any]) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.ensure_future(read())
            # Nobody may be waiting any more when it fails: the error was told to whoever was.
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.wait({self._task}, timeout=PATIENCE_SECONDS)
        if self._task.done() and not isinstance(self._task.exception(), PmqdError | None):
            self._task.result()


def queue_rows(queues: list[dict[str, Any]], depths: list[Any]) -> dict[str, dict[str, Any]]:
    """The rows of `job_queues` by name, each with its depths; a queue that has jobs but no row is listed too."""
    empty = {"ready": 0, "scheduled": 0, "running": 0, "failed": 0, "oldest_ready_seconds": 0.0}
    rows = {row["name"]: {**row, **empty} for row in queues}
    for depth in depths:
        row = rows.setdefault(depth.queue_name, {"name": depth.queue_name, "is_active": True, **empty})
        row.update({name: getattr(depth, name) for name in empty})
        row["oldest_ready_seconds"] = float(row["oldest_ready_seconds"] or 0.0)
    return dict(sorted(rows.items()))


def lengths_by_queue(broker: Broker, names: list[str]) -> dict[str, int]:
    """How many hints of each queue are in Redis, all bands together; one round trip.

    Raises:
        BrokerUnavailable: Redis is away.
    """
    keys = {name: [broker.queue_key(name, band) for band in BAND_RANGES] for name in names}
    lengths = broker.lengths([key for of_queue in keys.values() for key in of_queue]) if names else {}
    return {name: sum(lengths.get(key, 0) for key in of_queue) for name, of_queue in keys.items()}


def _queue_figures(store: Store) -> Figures:
    return Figures(queue_rows(store.list_queues(), store.depths()), time.monotonic())


def _redis_figures(broker: Broker, names: list[str]) -> RedisFigures:
    lengths = lengths_by_queue(broker, names)
    return RedisFigures(lengths, broker.info(), up=True, at=time.monotonic())
