"""The clerk's side of Redis: the outstanding pop, the live status, and how a worker does without Redis and comes back.

Without Redis a worker is in *direct mode*: it claims from PostgreSQL alone. Whether Redis answers again is tried by
a thread of its own, because a server that neither answers nor refuses would hold up the clerk for the whole timeout.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from pmqd import batching
from pmqd.broker import Broker
from pmqd.errors import BrokerUnavailable
from pmqd.hints import Hint
from pmqd.live import Event
from pmqd.logs import Edge
from pmqd.settings import RedisSettings
from pmqd.slot import Slot

log = logging.getLogger(__name__)

POP_SECONDS: Final = 1.0
"""How long Redis may hold a pop while all lists are empty: after that PostgreSQL may be asked what is ready."""
PROBE_SECONDS: Final = 1.0
"""How often a worker in direct mode tries Redis."""


class Delivery:
    """What one worker has to do with Redis. No method raises because Redis is away."""

    def __init__(
        self,
        settings: RedisSettings,
        role: str,
        slot: Slot,
        lists: Sequence[tuple[str, str]],
        wake: Callable[[], None],
    ) -> None:
        """Takes the settings, the role, the arena's record, the lists (queue, band) in order, and what wakes the clerk."""
        self._settings = settings
        self._role = role
        self._slot = slot
        self._wake = wake
        self._broker = Broker(settings, role)
        self._keys = [self._broker.queue_key(queue, band) for queue, band in lists]
        # A pop of its own for the high band: while the worker has enough of everything else, it has no other under way.
        self._urgent = Broker(settings, role)
        self._urgent_keys = [self._urgent.queue_key(queue, band) for queue, band in lists if band == "high"]
        self._pops = 0
        self._popping_since = 0.0
        self._away = Edge(log, "Redis is away, claiming from PostgreSQL", "Redis is back")
        self._probe_at = 0.0
        self._probe: threading.Thread | None = None
        self._probed: list[Hint] | None = None
        self._closed = False
        self._closing = threading.Lock()

    @property
    def direct(self) -> bool:
        """Whether this worker does without Redis."""
        return bool(self._away)

    def popping_for(self, now: float) -> float | None:
        """Seconds since the pop that is under way was asked for; None where none is."""
        return now - self._popping_since if self._broker.popping else None

    def answer_within(self, now: float) -> float:
        """Seconds until an answer of Redis, or its absence, is to be looked at: an answer wakes; a second where none is under way."""
        return self._broker.pop_left(now) if self._broker.popping else 1.0

    def filenos(self) -> list[int]:
        """The descriptors that become readable with the answers to the pops that are under way."""
        return [each.pop_fileno() for each in (self._broker, self._urgent) if each.popping]

    def ask(self, count: int, now: float) -> None:
        """Asks for up to `count` hints, without waiting for them; nothing where a pop is under way, or in direct mode."""
        if self.direct or self._broker.popping:
            return
        try:
            self._broker.pop_start(batching.rotated(self._keys, self._pops), count, POP_SECONDS)
        except BrokerUnavailable as error:
            self._lost(error)
        self._pops += 1
        self._popping_since = now

    def ask_urgent(self, count: int) -> None:
        """The same for the high band alone, beside the other pop."""
        if self.direct or self._urgent.popping:
            return
        try:
            self._urgent.pop_start(self._urgent_keys, count, POP_SECONDS)
        except BrokerUnavailable as error:
            self._lost(error)

    def take(self, now: float) -> list[Hint] | None:
        """The hints that have come: empty where the pop's time was up, None where nothing has come yet."""
        return self._look(now) if self.direct else self._answer(self._broker, now)

    def take_urgent(self, now: float) -> list[Hint]:
        """What the pop of the high band has brought."""
        return [] if self.direct else self._answer(self._urgent, now) or []

    def give_back(self, hints: Sequence[Hint]) -> None:
        """Puts hints back that were not claimed. Those that cannot be are found again: their rows stay marked."""
        if hints and not self.direct:
            try:
                self._broker.give_back([(hint.key, hint.member) for hint in hints])
            except BrokerUnavailable as error:
                self._lost(error)

    def tell(self, events: Sequence[Event]) -> None:
        """Writes the live status of jobs; best effort."""
        if events and not self.direct:
            try:
                self._broker.tell(events)
            except BrokerUnavailable as error:
                self._lost(error)

    def stop(self) -> None:
        """Ends the pops under way; what they had got goes back to where it was."""
        for each in (self._broker, self._urgent):
            if each.popping:
                try:
                    self.give_back(each.pop_cancel())
                except BrokerUnavailable as error:
                    self._lost(error)

    def close(self) -> None:
        """Ends the connections."""
        with self._closing:
            self._closed = True
        self.stop()
        self._broker.reset()
        self._urgent.reset()

    def _answer(self, broker: Broker, now: float) -> list[Hint] | None:
        if not broker.popping:
            return None
        try:
            if broker.pop_ready():
                return broker.pop_finish()
        except BrokerUnavailable as error:
            self._lost(error)
        else:
            if broker.pop_overdue(now):
                self._lost(BrokerUnavailable("it did not answer in time"))
        return None

    def _lost(self, error: BrokerUnavailable) -> None:
        self._broker.reset()
        self._urgent.reset()
        self._slot.direct = True
        self._away.set(True, error)
        self._probe_at = time.monotonic() + PROBE_SECONDS * random.uniform(0.75, 1.25)  # noqa: S311 - jitter

    def _look(self, now: float) -> list[Hint] | None:
        """In direct mode: whether a probe was answered, and the next probe when it is time."""
        if self._probed is not None:
            hints, self._probed = self._probed, None
            self._slot.direct = False
            self._away.set(False)
            return hints or None
        if now >= self._probe_at and (self._probe is None or not self._probe.is_alive()):
            self._probe_at = now + PROBE_SECONDS * random.uniform(0.75, 1.25)  # noqa: S311 - jitter
            self._probe = threading.Thread(target=self._try_pop, name="redis-probe", daemon=True)
            self._probe.start()
        return None

    def _try_pop(self) -> None:
        """A write and a whole pop, not a ping: a replica answers pings too, a server out of memory even pops."""
        broker = Broker(self._settings, self._role)
        try:
            broker.server_life()
            broker.pop_start(self._keys, 1, 0.001)
            hints = broker.pop_finish()
            with self._closing:  # nobody is to be woken once this is closed: what wakes it is gone soon after
                closed = self._closed
                if not closed:
                    self._probed = hints
                    self._wake()
            if closed:
                broker.give_back([(hint.key, hint.member) for hint in hints])
        except BrokerUnavailable:
            pass  # the next probe follows
        finally:
            broker.reset()
