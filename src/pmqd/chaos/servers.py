"""The run's own PostgreSQL and Redis: started by a thread that lives as long as the run, whoever asks for it.

The kernel ends a server when the thread that started it does (PR_SET_PDEATHSIG goes by thread), and the faults are made
in a thread that ends before the run does.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self, TypeVar

from pmqd.chaos.machine import free_port
from pmqd.embedded import PostgresServer, RedisServer
from pmqd.errors import EmbeddedError

T = TypeVar("T")

_START_SECONDS = 60.0
_AGAIN_SECONDS = 0.2


class Keeper:
    """One thread that starts processes for others, and stays."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"keeper-{name}")

    def run(self, start: Callable[[], T]) -> T:
        """Call it there, and return or raise what it does."""
        return self._threads.submit(start).result()

    def close(self) -> None:
        """End the thread. What it has started must have ended before."""
        self._threads.shutdown()


class KeptPostgres(PostgresServer):
    """PostgreSQL that any thread may start."""

    def __init__(self, directory: Path, keeper: Keeper, settings: dict[str, str]) -> None:
        super().__init__(directory, settings=settings)
        self._keeper = keeper

    def start(self) -> Self:
        """Start, again and again for a while: what a killed postmaster left holds its shared memory for a moment."""
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                return self._keeper.run(super().start)
            except EmbeddedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_AGAIN_SECONDS)


class KeptRedis(RedisServer):
    """Redis that any thread may start."""

    def __init__(self, directory: Path, keeper: Keeper) -> None:
        super().__init__(directory, tcp=True)
        self._keeper = keeper
        self.port = free_port()

    def start(self) -> Self:
        """Start and wait until it answers."""
        return self._keeper.run(super().start)
