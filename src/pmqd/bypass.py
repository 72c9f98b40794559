"""The high-priority bypass of producers: the hint of a job in the high band, pushed right after its commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from uuid import UUID

from pmqd.config import RedisSettings
from pmqd.errors import BrokerUnavailable
from pmqd.job import BAND_RANGES
from pmqd.rows import Row

if TYPE_CHECKING:  # a producer without Redis never loads it
    from pmqd.broker import Broker

_HINT_TIMEOUT_SECONDS: Final = 0.25
_HINT_PAUSE_SECONDS: Final = 5.0
_HINTS_MOST: Final = 100  # in a list; the migrator brings the others anyway
_HIGHEST_IN_BAND: Final = BAND_RANGES["high"][1]


class Bypass:
    """The high-priority bypass: after the commit the producer itself tells Redis.

    Best effort: what is not told is delivered by the migrator a moment later.
    """

    def __init__(self, settings: RedisSettings) -> None:
        """Takes `[redis]`; a producer that says nothing of Redis leaves it alone."""
        self._redis = settings
        self._broker: Broker | None = None
        self._lock = threading.Lock()
        self._not_before = 0.0

    def wanted(self, rows: Sequence[Row]) -> bool:
        """Whether a push would be tried."""
        return self._redis.configured and time.monotonic() >= self._not_before and any(map(_hinted, rows))

    def push(self, rows: Sequence[Row]) -> None:
        """Pushes the hints of high-band jobs that are due."""
        if not self.wanted(rows):
            return
        queues: dict[str, list[UUID]] = {}
        for row in filter(_hinted, rows):
            queues.setdefault(row.queue_name, []).append(row.id)
        with self._lock:
            try:
                for name, ids in queues.items():
                    self._opened().hint(name, ids[:_HINTS_MOST], longest=_HINTS_MOST)
            except BrokerUnavailable:
                self._not_before = time.monotonic() + _HINT_PAUSE_SECONDS

    def close(self) -> None:
        """Ends the connection to Redis."""
        with self._lock, suppress(BrokerUnavailable):
            if self._broker is not None:
                self._broker.close()
                self._broker = None

    def _opened(self) -> Broker:
        from pmqd.broker import Broker  # noqa: PLC0415 - a producer without Redis never loads it

        if self._broker is None:
            self._broker = Broker(self._redis, "client", timeout_seconds=_HINT_TIMEOUT_SECONDS)
        return self._broker


def _hinted(row: Row) -> bool:
    return row.priority is not None and row.priority <= _HIGHEST_IN_BAND and row.run_at is None
