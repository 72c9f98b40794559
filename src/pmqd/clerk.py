"""The one thread of a worker that does its input and output: pop, claim, hand over, settle, tell, watch.

It sleeps in one `poll` over the answer to the outstanding pop, the runners' wake-up and the stop flag, so neither
waits for the other: a finished job is settled while its neighbour runs for minutes, and a claimed job that cannot
start is given back. `docs/decisions/0002-clerk.md` says why it is one thread.
"""

import contextlib
import logging
import math
import os
import random
import select
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol
from uuid import UUID

from pmqd import batching, metrics
from pmqd.arena import Arena, boottime
from pmqd.delivery import Delivery
from pmqd.desk import Desk, Finished, Item
from pmqd.errors import StoreUnavailable
from pmqd.executor import DEFAULT_TIMEOUT_SECONDS, Executor
from pmqd.hints import Hint
from pmqd.job import BAND_RANGES, Claimed, Outcome
from pmqd.ledger import Answer, Ledger
from pmqd.logs import Edge
from pmqd.overseer import Overseer
from pmqd.registry import Registry, Task
from pmqd.retry import RetryPolicy, release
from pmqd.settings import PoolSettings, QueueSettings, Settings
from pmqd.slot import Slot, State
from pmqd.store import Store

log = logging.getLogger(__name__)

UNKNOWN_KIND_SECONDS: Final = 30.0
"""When a job of a kind that is not known here is looked at again."""
SAVE_AFTER_SECONDS: Final = 3.0
"""How long a worker with nothing else left to do waits for PostgreSQL before it leaves its settles in a file."""

_SAVE_BEFORE_KILL_SECONDS: Final = (
    2.0  # before the drain's deadline, when jobs still run and PostgreSQL is away
)
_LOOK_SECONDS: Final = 0.05
_LATE_CLOSE_SECONDS: Final = 1.0
_OLD_PULSE_SECONDS: Final = 3.0
_OLD_LEASE_SECONDS: Final = 5.0
_MASTER_ALIVE_SECONDS: Final = 5.0


class Stop(Protocol):
    """The stop flag, as far as the clerk looks at it."""

    def is_set(self) -> bool:
        """Whether the worker is to drain and end."""

    def fileno(self) -> int:
        """Readable once the flag is set."""


@dataclass(frozen=True)
class Post:
    """All that a clerk is given.

    Attributes:
        settings: the configuration.
        pool: the worker's pool.
        pool_index: its place in the settings.
        queues: the queues served, most important first.
        registry: what the application handles.
        arena: the shared memory.
        slot: this worker's own record in it.
        worker_id: this worker's name in PostgreSQL.
        stop: set once the worker is to drain and end.
        bell: an eventfd that wakes the clerk.
        max_jobs: jobs after which this worker is replaced and takes no more; 0 is never.
        checkpoint: the named crash points.
        save: writes down settles that PostgreSQL could not take, and claims that are over, instead of what was
            written before; with nothing, that is taken away again.
    """

    settings: Settings
    pool: PoolSettings
    pool_index: int
    queues: Sequence[str]
    registry: Registry
    arena: Arena
    slot: Slot
    worker_id: str
    stop: Stop
    bell: int
    max_jobs: int
    checkpoint: Callable[[str], None]
    save: Callable[[Sequence[Outcome], Sequence[UUID]], None]

    def ring(self) -> None:
        """Wakes the clerk; from any thread."""
        os.eventfd_write(self.bell, 1)


@dataclass(frozen=True, slots=True)
class _Handling:
    """How the jobs of one queue and kind are run: by which task, for how long (s), how often, and whether only while the lease holds."""

    task: Task
    timeout: float
    policy: RetryPolicy
    abort: bool


class Clerk:
    """One worker's clerk; `run` is its thread."""

    def __init__(self, post: Post, desk: Desk, executor: Executor) -> None:
        """Takes what it is given, the desk that it shares with the runners, and who runs the jobs."""
        self._post = post
        self._desk = desk
        self._store = Store(post.settings.postgres, "worker", newest=post.arena)
        self._store.retrying = post.slot.progress
        self._ledger = Ledger(
            self._store, desk, post.slot, post.worker_id, lambda: post.arena.instance_id, post.checkpoint
        )
        lists = batching.lists(post.queues, post.pool.order)
        self._delivery = Delivery(post.settings.redis, "worker", post.slot, lists, post.ring)
        self._overseer = Overseer(post, desk, executor)
        self._durations: deque[float] = deque(maxlen=batching.SAMPLES)
        # In the other order a queue's lower bands come before the next queue's high one.
        self._urgent_to = BAND_RANGES["high"][1] if post.pool.order == "bands" else 0
        self._urgent_at = float("-inf")
        self._deep = False
        self._ahead = 0
        self._seen = desk.load(0.0)
        self._in_hand: list[Hint] = []
        self._draining = False
        self._drained_since: float | None = None
        self._save_at = 0.0
        self._saved = False
        self._away = Edge(log, "PostgreSQL is away, nothing new is claimed", "PostgreSQL is back")
        self._failures = 0
        self._store_at = 0.0
        self._pop_was_empty = False
        self._steals = self._misses = 0
        self._steal_at = 0.0
        self._looked = self._closed_at = self._renewed = 0.0
        self._defaults: dict[str, tuple[float, RetryPolicy, bool]] = {}

    def run(self) -> None:
        """Works until the stop flag is set and everything is given back, finished and settled (or written down)."""
        while not self._over(time.monotonic()):
            self.round(time.monotonic())
        self._post.checkpoint("worker.drained")

    def close(self) -> None:
        """Ends the connections."""
        self._delivery.close()
        self._store.close()

    def round(self, now: float) -> None:
        """One round of work, and the sleep after it (now: monotonic seconds)."""
        self._post.slot.progress()
        if not self._draining and self._post.stop.is_set():
            self._drain(now)
        self._collect()
        if now >= self._store_at:
            self._visit_store(now)
        else:
            self._delivery.give_back([*(self._delivery.take(now) or []), *self._delivery.take_urgent(now)])
        if now - self._looked >= _LOOK_SECONDS:  # after the claim: a hint that has come waits for nothing
            self._looked = now
            self._owe(self._overseer.look(now))
        events = self._overseer.events(now)
        self._post.slot.deep = self._deep
        if events:
            self._post.checkpoint("worker.telling")
            self._delivery.tell(events)
        self._rest()

    # what has ended

    def _collect(self) -> None:
        finished = self._desk.collect()
        durations = [each.outcome.duration_seconds for each in finished]
        self._desk.spread(durations, time.monotonic())
        if not finished:
            return
        self._durations.extend(durations)
        self._ahead = batching.ahead(self._durations, self._post.pool.concurrency)
        if time.monotonic() - self._urgent_at < batching.URGENT_SECONDS:
            self._ahead = min(self._ahead, batching.URGENT_CAP)
        self._post.slot.jobs_done += len(finished)
        self._post.slot.busy_ns += int(sum(durations) * 1e9)
        _observe_pickups(finished)
        self._overseer.ended(self._ledger.owe(finished))

    def _owe(self, released: Sequence[Finished]) -> None:
        if released:
            self._ledger.owe(released)
            self._desk.hand_over(())  # what stood behind them may have its turn

    # PostgreSQL

    def _visit_store(self, now: float) -> None:
        try:
            self._serve(now)
        except StoreUnavailable as error:
            self._store_lost(error)
        else:
            self._failures = 0
            self._away.set(False)
            if self._saved and not self._ledger.owes:
                self._saved = False
                self._post.save([], [])

    def _serve(self, now: float) -> None:
        self._accept(self._ledger.read_back(now))
        if self._failures:
            # What is done comes before anything new; with nothing owed it is a question whether PostgreSQL is there.
            self._accept(self._ledger.settle())
        self._claim_urgent(now)
        self._claim(now)
        self._ask(now)
        self._steal(now)
        if self._settle_wait(time.monotonic()) <= 0 or self._late_close(now):
            self._accept(self._ledger.settle())
        self._renew_lease(now)

    def _claim(self, now: float) -> None:
        hints = self._delivery.take(now)
        if hints is None:
            return
        self._pop_was_empty = not hints
        self._deep = self._deep and bool(hints)
        # The pop may have been asked for a second ago, when there was more room: who cannot start a job must not take it.
        room = 0 if self._draining else batching.room(self._desk.load(now), self._ahead)
        self._delivery.give_back(hints[room:])
        hints = hints[:room]
        others = self._wanted(self._desk.load(now)) - len(hints)
        if hints and others > 0 and self._dives() and self._may_steal(now):
            self._claim_best(others, hints)
        elif batching.is_deep(self._claim_hints(hints)):
            self._deep = True

    def _claim_urgent(self, now: float) -> None:
        hints = self._delivery.take_urgent(now)
        if hints and (self._draining or not batching.is_flood(self._desk.load(now))):
            self._delivery.give_back(hints)  # who has a free place has asked for all bands
        else:
            self._claim_hints(hints)

    def _claim_hints(self, hints: Sequence[Hint]) -> int:
        """Claims these jobs; how many were won."""
        if not hints:
            return 0
        self._post.checkpoint("worker.popped")
        self._in_hand = list(hints)
        answer = self._ledger.claim([hint.id for hint in hints])
        self._accept(answer)
        self._in_hand = []
        return len(answer.claimed)

    def _ask(self, now: float) -> None:
        self._seen = self._desk.load(now)
        count = self._wanted(self._seen)
        if count:
            self._delivery.ask(min(count, batching.DEEP_HINTS) if self._dives() else count, now)
        elif self._urgent_to and not self._draining and batching.is_flood(self._seen):
            self._delivery.ask_urgent(self._post.pool.concurrency)
        sys.setswitchinterval(batching.switch_seconds(self._seen, self._ahead))

    def _wanted(self, load: batching.Load) -> int:
        """How many jobs to claim now."""
        if self._draining:
            return 0
        count = batching.wanted(load, self._ahead)
        if self._post.max_jobs:
            taken = self._post.slot.jobs_done + load.busy + load.waiting
            count = min(count, max(0, self._post.max_jobs - taken))
        return count

    def _wanted_without_hints(self, load: batching.Load, now: float) -> int:
        """How many jobs to claim without hints: those that the pop under way does not bring."""
        count = self._wanted(load)
        if self._dives() and not self._unfed and self._delivery.popping_for(now) is not None:
            count -= batching.DEEP_HINTS
        return max(0, count)

    def _steal(self, now: float) -> None:
        """Claims without hints: the normal way without Redis and where hundreds of quick jobs wait, else the net under a lost hint."""
        count = self._wanted_without_hints(self._desk.load(now), now)
        if count and self._may_steal(now):
            self._claim_best(count)

    def _claim_best(self, count: int, hints: Sequence[Hint] = ()) -> None:
        """Claims so many of the best jobs, and beside them those of these hints."""
        if hints:
            self._post.checkpoint("worker.popped")
            self._in_hand = list(hints)
        dives, hinted = self._dives(), [hint.id for hint in hints]
        queues = batching.rotated(self._post.queues, self._steals)
        self._steals += 1
        # Deep, the jobs that are marked are left to their hints, which come in small lots: none becomes useless, and few are marked.
        answer = self._ledger.steal(
            queues, count, self._post.pool.order, marked=self._unfed or not dives, hinted=hinted
        )
        self._in_hand = []
        claimed = len(answer.claimed)
        self._deep = dives and batching.is_deep(claimed, already=True)
        self._misses = 0 if claimed else self._misses + 1
        self._steal_at = time.monotonic() + (0 if claimed else batching.steal_pause(self._misses))
        known = {each.int for each in hinted}
        stolen = Counter(each.queue_name for each in answer.claimed if each.id.int not in known)
        for queue, number in stolen.items():
            metrics.count_stolen(queue, number)
        self._accept(answer)

    def _dives(self) -> bool:
        """Whether to claim straight from PostgreSQL: hundreds came by their hints at once, here or in another worker of the pool."""
        index = self._post.pool_index
        return self._deep or any(slot.deep and slot.pool_index == index for slot in self._post.arena.slots)

    def _may_steal(self, now: float) -> bool:
        if self._unfed or self._dives():
            return now >= self._steal_at
        if not self._pop_was_empty:
            return False
        self._pop_was_empty = False
        return self._something_ready(now) and self._post.arena.try_steal(self._post.pool_index, now)

    @property
    def _unfed(self) -> bool:
        """Whether no hints come: Redis is away for this worker, or for the migrator (out of memory, it still lets us pop)."""
        return self._delivery.direct or self._post.arena.redis_down

    def _something_ready(self, now: float) -> bool:
        """Whether the pulse says so; without a pulse nobody knows, and asking is cheap."""
        if self._post.arena.pulse_age(now) > _OLD_PULSE_SECONDS:
            return True
        pulse = self._post.arena.pulse()
        known = [pulse[queue] for queue in self._post.queues if queue in pulse]
        return any(each["ready"] or (each["due_at"] is not None and each["due_at"] <= now) for each in known)

    def _late_close(self, now: float) -> bool:
        """Claims that are over are told with the next settle; with none, after a while."""
        if not self._ledger.closing:
            self._closed_at = now
            return False
        return self._draining or now - self._closed_at >= _LATE_CLOSE_SECONDS

    def _renew_lease(self, now: float) -> None:
        """The lease is maintenance's affair; when it has not been renewed for long, any child does it, the master living."""
        arena = self._post.arena
        if not _OLD_LEASE_SECONDS < arena.lease_age(now) < float("inf") or now - self._renewed < 1.0:
            return
        self._renewed = now
        if arena.master_age(now) < _MASTER_ALIVE_SECONDS:
            asked = boottime()
            beat = self._store.beat(arena.instance_id, holding=False, stalled_tick=None)
            if not beat.lost:
                arena.lease_renewed(asked)

    def _store_lost(self, error: StoreUnavailable) -> None:
        self._away.set(True, error)
        self._failures += 1
        self._store_at = time.monotonic() + batching.away_pause(self._failures, random.random())  # noqa: S311 - jitter
        hints, self._in_hand = self._in_hand, []
        self._delivery.give_back(hints)
        if self._draining and time.monotonic() > self._save_at:
            self._save()

    # what was claimed

    def _accept(self, answer: Answer) -> None:
        self._overseer.ended(answer.settled)
        if not answer.claimed:
            return
        received = time.monotonic()
        items, urgent, released = list[Item](), list[Item](), list[Finished]()
        found: dict[tuple[str, str | None], _Handling | None] = {}
        for claimed in answer.claimed:
            pair = claimed.queue_name, claimed.kind
            if pair not in found:
                found[pair] = self._handling(*pair)
            how = found[pair]
            if how is None:
                released.append(self._unknown(claimed, received))
            # Another queue's job: its id stood in a list of ours. Whoever writes to Redis does not choose who runs a job.
            elif self._draining or claimed.queue_name not in self._post.queues:
                released.append(Finished(None, release(claimed, self._post.worker_id), received))
            else:
                item = Item(claimed, how.task, how.timeout, how.policy, received, answer.asked, how.abort)
                (urgent if claimed.priority <= self._urgent_to else items).append(item)
        if urgent and (items or batching.is_flood(self._desk.load(received))):
            self._urgent_at = received
        self._desk.hand_over(items, urgent)
        self._post.checkpoint("worker.handed_over")
        self._ledger.owe(released)

    def _handling(self, queue: str, kind: str | None) -> "_Handling | None":
        task = self._post.registry.find(queue, kind)
        if task is None:
            return None
        timeout, policy, abort = self._of_queue(queue)
        return _Handling(task, task.timeout or timeout, task.retry or policy, abort=abort)

    def _of_queue(self, name: str) -> tuple[float, RetryPolicy, bool]:
        """Timeout and backoff of a queue, for tasks that have none of their own; whether its jobs must not outlive the lease."""
        known = self._defaults.get(name)
        if known is None:
            queue, usual = self._post.settings.queues.get(name, QueueSettings()), RetryPolicy()
            policy = RetryPolicy(
                queue.retry_base_seconds or usual.base_seconds, queue.retry_max_seconds or usual.max_seconds
            )
            timeout = queue.timeout_seconds or DEFAULT_TIMEOUT_SECONDS
            known = self._defaults[name] = timeout, policy, queue.isolation == "abort"
        return known

    def _unknown(self, claimed: Claimed, now: float) -> Finished:
        what = f"kind {claimed.kind!r}" if claimed.kind is not None else "a handler for jobs without a kind"
        reason = f"the application {self._post.pool.app} does not know {what}"
        outcome = release(claimed, self._post.worker_id, delay_seconds=UNKNOWN_KIND_SECONDS, reason=reason)
        return Finished(None, outcome, now)

    # sleeping

    def _rest(self) -> None:
        now = time.monotonic()
        load = self._desk.load(now)
        if not self._draining:
            self._post.slot.state = State.BUSY if load.busy else State.IDLE
        seconds = self._desk.rest(max(0.0, self._wait(load, now)), self._seen, self._ahead)
        poller = select.poll()
        for fd in (self._post.bell, *self._delivery.filenos()):
            poller.register(fd, select.POLLIN)
        if not self._draining:
            poller.register(self._post.stop.fileno(), select.POLLIN)
        end = now + seconds
        while self._desk.spread((), now) and now + batching.STALL_SECONDS < end:
            if poller.poll(batching.STALL_SECONDS * 1000):
                end = now
            now = time.monotonic()
        ready = poller.poll(max(0.0, end - now) * 1000)
        self._desk.woken()
        if any(descriptor == self._post.bell for descriptor, _ in ready):
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._post.bell)

    def _wait(self, load: batching.Load, now: float) -> float:
        """Seconds until something is due that wakes nobody by itself."""
        waits = [self._delivery.answer_within(now)]
        if load.busy or load.waiting:
            waits.append(_LOOK_SECONDS)
        if self._ledger.closing:
            waits.append(_LATE_CLOSE_SECONDS)
        if now < self._store_at:
            waits.append(self._store_at - now)
        else:
            waits.append(self._settle_wait(now))
            if self._draining and not load.busy:
                waits.append(0.0)  # look at once whether that was all
            if (self._unfed or self._dives()) and self._wanted_without_hints(load, now):
                waits.append(self._steal_at - now)
        return min(waits)

    def _settle_wait(self, now: float) -> float:
        oldest = self._ledger.oldest()
        if oldest is None:
            return math.inf
        load = self._desk.load(now)
        return batching.settle_wait(now - oldest, self._delivery.popping_for(now), load)

    # the end

    def _drain(self, now: float) -> None:
        """No new claims; what has not started goes back first, hints before anything else."""
        self._draining = True
        self._save_at = now + self._post.settings.drain_seconds - _SAVE_BEFORE_KILL_SECONDS
        self._post.slot.state = State.DRAINING
        self._delivery.stop()
        self._post.checkpoint("worker.draining")
        released = [self._overseer.release(item, now) for item in self._desk.withdraw_all()]
        self._ledger.owe(released)
        self._post.checkpoint("worker.released")
        log.info("draining: %d unstarted jobs given back", len(released))

    def _over(self, now: float) -> bool:
        if not self._draining:
            return False
        load = self._desk.load(now)
        if load.busy or load.waiting:
            return False
        self._collect()
        if not self._ledger.owes and not self._ledger.closing:
            return True
        if self._drained_since is None:
            self._drained_since = now
        if self._failures and now - self._drained_since > SAVE_AFTER_SECONDS:
            self._save()
            return True
        return False

    def _save(self) -> None:
        outcomes, closed = self._ledger.saved()
        if outcomes:
            self._saved = True
            self._post.save(outcomes, closed)
            self._post.checkpoint("worker.saved")


def _observe_pickups(finished: Sequence[Finished]) -> None:
    pickups: dict[tuple[str, str | None], list[float]] = {}
    for each in finished:
        if each.item is not None and each.outcome.started is not None:
            waited = each.outcome.started - each.item.claimed.run_at
            pickups.setdefault((each.outcome.queue_name, each.outcome.kind), []).append(waited)
    for (queue, kind), seconds in pickups.items():
        metrics.observe_pickups(queue, kind, seconds)
