"""Where the clerk hands claimed jobs over to those who run them, and gets them back when they have ended.

One lock decides the only question that two threads could answer differently: whether a claimed job is started or
taken back. Nothing here waits and nothing here speaks to a store.
"""

import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING
from uuid import UUID

from pmqd.batching import Load, Spread, flush_seconds, low_water
from pmqd.job import Claimed, Outcome
from pmqd.registry import Task
from pmqd.retry import RetryPolicy
from pmqd.slot import Slot

if TYPE_CHECKING:  # the executor imports this module
    from pmqd.executor import Attempt


class Stage(Enum):
    """How far a claimed job has come in this process."""

    WAITING = "waiting"
    STARTED = "started"
    WITHDRAWN = "withdrawn"


_STARTED = Stage.STARTED  # an enumeration's members are slow to be looked up


@dataclass(slots=True, eq=False)
class Item:
    """A claimed job in this process.

    Attributes:
        claimed: the row.
        task: what runs it.
        timeout: seconds until the soft timeout.
        policy: its backoff.
        received: when the claim's answer came (monotonic seconds).
        asked: when the claim was sent, or before that.
        abort: it must not outlive the instance's lease.
        stage: how far it has come; changed under the desk's lock alone.
        entry: its place among those that run; -1 while it waits.
        started: when it was started (monotonic seconds).
        attempt: what can interrupt it while it runs.
        told: whether people were told that it runs.
        urgent: whether it went before others that waited.
    """

    claimed: Claimed
    task: Task
    timeout: float
    policy: RetryPolicy
    received: float
    asked: float = 0.0
    abort: bool = False
    stage: Stage = Stage.WAITING
    entry: int = -1
    started: float = 0.0
    attempt: "Attempt | None" = None
    told: bool = False
    urgent: bool = False


@dataclass(slots=True)
class Finished:
    """A job whose handler has ended, or one that is given back; never changed.

    Attributes:
        item: the job; None where it never came as far as the desk.
        outcome: what its end amounts to.
        ended: when (monotonic seconds).
        acknowledged: it settled itself, in the handler's own transaction.
        doubt: what it tried to settle itself, when nobody knows whether that was committed.
        places: where that is noted in the arena, until it is settled and counted.
    """

    item: Item | None
    outcome: Outcome
    ended: float
    acknowledged: bool = False
    doubt: Outcome | None = None
    places: tuple[int, ...] = ()


class Desk:
    """The jobs that one worker process holds. Every method may be called from any thread.

    Attributes:
        dispatch: set by the crew: brings a job to the one who runs it, and does not wait for it.
    """

    def __init__(self, concurrency: int, slot: Slot, wake: Callable[[], None]) -> None:
        """Takes how many run at once, the arena's record of this worker, and what wakes the clerk."""
        self.dispatch: Callable[[Item], None]
        self._concurrency = concurrency
        self._slot = slot
        self._wake = wake
        self._lock = threading.Lock()
        self._waiting: deque[Item] = deque()
        self._spread = Spread(concurrency)
        self._idle = list(range(concurrency - 1, -1, -1))
        self._running: dict[int, Item] = {}
        self._alone = False
        self._finished: list[Finished] = []
        self._owed = False
        self._last_start = 0.0
        self._wake_at = 0
        self._asleep = False

    # the clerk's side

    def hand_over(self, items: Iterable[Item], urgent: Sequence[Item] = ()) -> None:
        """Takes claimed jobs in; those that find a free place are dispatched.

        Args:
            items: go behind those that wait.
            urgent: go before them, behind those that were urgent before.
        """
        with self._lock:
            self._waiting.extend(items)
            if urgent:
                self._put_first(urgent)
            ready = self._assign()
        for item in ready:
            self.dispatch(item)

    def withdraw(self, received_before: float) -> list[Item]:
        """Takes back jobs that were not started, claimed before a moment.

        A job that is held back until it can run alone stays: what runs beside it ends, and nothing is started meanwhile.
        """
        with self._lock:
            held = self._held()
            return self._take_back(lambda item: item.received < received_before and item is not held)

    def withdraw_all(self) -> list[Item]:
        """Takes back all jobs that were not started."""
        with self._lock:
            return self._take_back(lambda _: True)

    def withdraw_jobs(self, wanted: Collection[tuple[UUID, UUID]]) -> list[Item]:
        """Takes back those of the given (job, token) that were not started."""
        with self._lock:
            return self._take_back(lambda item: (item.claimed.id, item.claimed.token) in wanted)

    def collect(self) -> list[Finished]:
        """The jobs that have ended since the last call. The clerk owes their settle from now on."""
        with self._lock:
            finished, self._finished = self._finished, []
            if finished:
                self._owed = True
        return finished

    def spread(self, durations: Sequence[float], now: float) -> bool:
        """Decides how many plain handlers run side by side, and starts more of them where one takes its time.

        Args:
            durations: of jobs that have ended since the last call (s).
            now: monotonic seconds.

        Returns:
            Whether jobs wait behind those that run, though there are places: then this is to be called again soon.
        """
        with self._lock:
            if durations:
                self._spread.observe(durations, now)
            if self._crowded():
                self._spread.stalled(now - self._last_start)
            ready = self._assign()
            crowded = self._crowded()
        for item in ready:
            self.dispatch(item)
        return crowded

    def settled(self, *, owed: bool) -> None:
        """A settle was answered; a job that waits to run alone may start when nothing more is owed."""
        with self._lock:
            self._owed = owed
            ready = self._assign()
        for item in ready:
            self.dispatch(item)

    def running(self) -> list[Item]:
        """The jobs whose user code runs."""
        with self._lock:
            return [item for item in self._running.values() if item.stage is Stage.STARTED]

    def load(self, now: float) -> Load:
        """How much there is to do (now: monotonic seconds)."""
        with self._lock:
            return Load(
                self._concurrency,
                len(self._running),
                len(self._waiting),
                now - self._last_start,
                self._held() is not None,
                bool(self._waiting) and self._waiting[-1].urgent,
            )

    def rest(self, seconds: float, seen: Load, room_ahead: int) -> float:
        """How long the clerk may sleep; from now on whoever has something for it wakes it.

        Args:
            seconds: what it would like to.
            seen: the load that it decided upon.
            room_ahead: how many jobs may wait: it wants to be woken when half of them are gone.
        """
        with self._lock:
            low, waiting, busy = low_water(room_ahead), len(self._waiting), len(self._running)
            if busy < seen.busy or waiting <= low < seen.waiting:
                return 0.0
            # What is below it has been asked for already. Nothing waits: a place is free with each job that ends.
            self._wake_at = low if waiting > low else 0
            self._asleep = True
            return min(seconds, flush_seconds(waiting)) if self._finished or waiting else seconds

    def woken(self) -> None:
        """The clerk is awake: nobody need wake it."""
        self._asleep = False

    def hurry(self, item: Item, deadline: float) -> None:
        """Moves the hard deadline of a job that runs (monotonic seconds)."""
        with self._lock:
            if self._running.get(item.entry) is item and item.stage is Stage.STARTED:
                self._slot.set_deadline(item.entry, deadline)

    # the runners' side

    def start(self, item: Item, now: float) -> bool:
        """Whether a dispatched job may be started; False where it was taken back meanwhile (then `leave`)."""
        if item.stage is _STARTED:  # together with the end of the job before it: see `finish`
            item.started = now
            return True
        with self._lock:
            if item.stage is Stage.WITHDRAWN:
                return False
            item.stage = _STARTED
            item.started = self._last_start = now
            return True

    def leave(self, item: Item) -> Item | None:
        """Frees the place of a job that was not started; gives the next job for this place, if there is one."""
        with self._lock:
            ready = self._free(item)
        return self._own(item, ready)

    def finish(self, item: Item, finished: Finished) -> Item | None:
        """Takes a job that has ended, and gives the next job for its place, if there is one."""
        with self._lock:
            self._finished.append(finished)
            self._slot.end(item.entry)  # its outcome has been noted before: see notes.py
            item.attempt = None  # which knows its item: a circle that would live until the collector runs
            following = self._pass_on(item, finished.ended)
            ready = self._free(item) if following is None else []
            wake = self._asleep and len(self._waiting) in (0, self._wake_at)
            if wake:
                self._asleep = False
        if wake:
            self._wake()
        return following or self._own(item, ready)

    # under the lock

    def _put_first(self, urgent: Sequence[Item]) -> None:
        place = 0
        while place < len(self._waiting) and self._waiting[place].urgent:
            place += 1
        for item in urgent:
            item.urgent = True
            self._waiting.insert(place, item)
            place += 1

    def _pass_on(self, item: Item, now: float) -> Item | None:
        """Starts the next plain job in the place of one that has ended, where nothing else is to be decided."""
        waiting = self._waiting
        if not waiting or item.claimed.alone or len(self._running) > self._spread.places:
            return None
        head = waiting[0]
        if (
            head.claimed.alone or item.task.is_async or head.task.is_async
        ):  # another thread runs it, some time
            return None
        waiting.popleft()
        head.entry, head.stage, head.started = item.entry, _STARTED, now
        self._running[item.entry] = head
        self._last_start = now
        return head

    def _crowded(self) -> bool:
        """Whether jobs wait behind one that runs alone, though there are places for them."""
        if not self._waiting or not self._idle or self._alone:
            return False
        return self._spread.places <= len(self._running) and self._held() is None

    def _held(self) -> Item | None:
        """The next job, if it must run alone and cannot yet.

        It waits for settles too: it may end the process at once, and what was done but not settled would run again.
        """
        head = self._waiting[0] if self._waiting else None
        if head is None or not head.claimed.alone:
            return None
        return head if self._running or self._finished or self._owed else None

    def _assign(self) -> list[Item]:
        """Gives free places to waiting jobs in order; one that must run alone waits for all places, and all wait for it."""
        ready = []
        while self._waiting and self._idle and not self._alone and self._held() is None:
            if len(self._running) >= self._spread.places and not self._waiting[0].task.is_async:
                break
            item = self._waiting.popleft()
            item.entry = self._idle.pop()
            self._running[item.entry] = item
            self._alone = item.claimed.alone
            ready.append(item)
        return ready

    def _free(self, item: Item) -> list[Item]:
        del self._running[item.entry]
        self._idle.append(item.entry)
        if item.claimed.alone:
            self._alone = False
        return self._assign()

    def _take_back(self, wanted: Callable[[Item], bool]) -> list[Item]:
        assigned = [item for item in self._running.values() if item.stage is Stage.WAITING]
        taken = [item for item in (*assigned, *self._waiting) if wanted(item)]
        for item in taken:
            item.stage = Stage.WITHDRAWN
        if taken:
            self._waiting = deque(item for item in self._waiting if item.stage is Stage.WAITING)
        return taken

    def _own(self, item: Item, ready: list[Item]) -> Item | None:
        own = None
        for each in ready:
            if each.entry == item.entry:
                own = each
            else:
                self.dispatch(each)
        return own
