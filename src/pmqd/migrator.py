"""The migrator: marks due rows in PostgreSQL and pushes their hints to Redis. One leads per database, others stand by.

Mark before push: whatever dies in between leaves a marked row without a hint, which is stolen or offered again.
How much lies in Redis and when to look again is decided in `window.py`.
"""

import logging
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from pmqd import live, metrics
from pmqd.arena import QueuePulse, boottime
from pmqd.broker import Broker, EpochMismatch
from pmqd.crashpoints import checkpoint
from pmqd.errors import BrokerUnavailable, ConfigError, SchemaError, StoreUnavailable
from pmqd.job import BAND_RANGES, band_of
from pmqd.logs import Edge
from pmqd.process import ChildContext, run_loop
from pmqd.store import LostLead, Marked, MarkedList, Position, Room, Store
from pmqd.window import (
    AWAKE_LOOK_SECONDS,
    DEEP_LOOK_SECONDS,
    URGENT_BATCH,
    URGENT_LOOK_SECONDS,
    URGENT_SECONDS,
    Flow,
    Looks,
    Pace,
    Wanted,
    asks,
    busier,
    jittered,
    left_over,
    look_again,
    look_in,
    looked,
    observe,
    room,
    stays_awake,
)

log = logging.getLogger(__name__)

STANDBY_SECONDS = 1.0
STORE_PAUSE_SECONDS = 0.5
PROBE_SECONDS = 1.0
LIFE_SECONDS = 1.0
"""How often Redis is asked which life of it this is, and how often a busy leader gives its sign of life."""
CALM_LIFE_SECONDS = 2.0
"""The same for one that only waits: it is taken for a ghost after five ticks, so a statement has three seconds."""
SERVED_SECONDS = 10.0
PING_SECONDS = 15.0
PING_ANSWER_SECONDS = 3.0
AWAKE_SECONDS = 1.0
REOFFER_SECONDS = 5.0
REOFFER_ROWS = 2000
DUE_MARGIN_SECONDS = 0.001
LEASE_OLD_SECONDS = 5.0
FROM_HEAD_SECONDS = 0.25
MASTER_ALIVE_SECONDS = 15.0


def main(context: ChildContext) -> None:
    """Runs the migrator until it is told to stop.

    Raises:
        SchemaError: the database's schema is not the one this program knows; ends the master.
    """
    migrator = Migrator(context)
    context.report_ready()
    try:
        run_loop(context, migrator.poll, migrator.fds)
    finally:
        migrator.close()


class Migrator:
    """Leads or stands by, and outlives the absence of either store."""

    def __init__(self, context: ChildContext) -> None:
        self._context = context
        self._store = Store(context.settings.postgres, "migrator", direct=True, newest=context.arena)
        self._broker = Broker(context.settings.redis, "migrator")
        self._lead: Lead | None = None
        self._rest_until = 0.0
        self._lease_at = 0.0
        self._away = Edge(log, "PostgreSQL is away", "PostgreSQL is back")

    def poll(self, now: float) -> float:
        """One round; returns the seconds until the next one at the latest. No absence of a store gets out of here."""
        if now < self._rest_until:
            return self._rest_until - now
        try:
            return self._turn(now)
        except (ConfigError, SchemaError):
            raise
        except LostLead:
            log.warning("another migrator leads now; standing by")
            return self._rest(now, STANDBY_SECONDS)
        except StoreUnavailable as error:
            self._away.set(True, error)
            return self._rest(now, STORE_PAUSE_SECONDS)
        except Exception:  # an unforeseen error must not become a crash loop of the leader
            pause = self._context.settings.migrator.error_pause_seconds
            log.exception("unexpected error; going on in %g s", pause)
            return self._rest(now, pause)

    def fds(self) -> list[int]:
        """The socket of the leading connection: it is readable when a notification has come."""
        return [] if self._lead is None else [self._store.connection.fileno()]

    def close(self) -> None:
        """Ends both connections; the lock goes with the one to PostgreSQL."""
        self._store.close()
        self._broker.close()

    def _turn(self, now: float) -> float:
        self._keep_lease(now)
        if self._lead is None:
            term = self._store.lead()
            self._away.set(False)
            if term is None:
                return self._stand_by(now)
            checkpoint("migrator.led")
            self._lead = Lead(self._context, self._store, self._broker, term)
        return self._lead.round(now)

    def _stand_by(self, now: float) -> float:
        """Another migrator leads. This one still says truthfully whether Redis is there for this instance's workers."""
        try:
            self._broker.server_life()
            self._context.arena.redis_down = False
        except BrokerUnavailable:
            self._context.arena.redis_down = True
        self._rest_until = now + STANDBY_SECONDS
        return STANDBY_SECONDS

    def _rest(self, now: float, seconds: float) -> float:
        """Drops the connection, and the lead with it: a migrator elsewhere may have more luck meanwhile."""
        self._lead = None
        self._store.reset()
        self._rest_until = now + jittered(seconds, random.random())  # noqa: S311 - no secret
        return self._rest_until - now

    def _keep_lease(self, now: float) -> None:
        """Renews the instance's lease when maintenance has not for a while, and only while the master lives."""
        arena = self._context.arena
        if now < self._lease_at or not LEASE_OLD_SECONDS < arena.lease_age(now) < float("inf"):
            return
        if arena.master_age(now) < MASTER_ALIVE_SECONDS:
            self._lease_at = now + 1.0
            asked = boottime()
            if not self._store.beat(arena.instance_id, holding=False, stalled_tick=None).lost:
                arena.lease_renewed(asked)


@dataclass(frozen=True, slots=True)
class Life:
    """The life of Redis that pushes are meant for: its epoch also stands in PostgreSQL, its run_id names the server."""

    epoch: UUID
    run_id: str


@dataclass(frozen=True, slots=True)
class Reached:
    """The last row that was marked for a list with a backlog, and when the list was last looked at from its head."""

    position: Position
    from_head_at: float


class Lead:
    """One leadership and all that it learnt. A lost lock or connection ends it, a lost Redis does not."""

    def __init__(self, context: ChildContext, store: Store, broker: Broker, term: int) -> None:
        self._arena, self._settings = context.arena, context.settings
        self._store, self._broker, self._term = store, broker, term
        now = time.monotonic()
        self._slots: dict[str, int] = {}
        self._flows: dict[tuple[str, str], Flow] = {}
        self._reached: dict[tuple[str, str], Reached] = {}
        self._named = set(self._settings.queues)
        self._served_at = now
        self._life: Life | None = None
        self._life_at = self._probe_at = now
        self._bound_at = float("-inf")
        self._owed: set[str] = set()
        self._reoffered_at: dict[str, float] = {}
        self._requests = context.arena.reoffer_requests
        self._urgent_at = float("-inf")
        self._pulse: Mapping[str, QueuePulse] = {}
        self._looked_at, self._look_at = float("-inf"), now
        self._looks: Looks | None = None
        self._pace, self._awake, self._awake_at = Pace(at=now), False, now
        self._live_at = now + LIFE_SECONDS
        self._ping_at, self._pinged_at = now + PING_SECONDS, float("inf")
        self._told = False
        self._down = Edge(log, "Redis is away, workers claim straight from PostgreSQL", "Redis is back")
        # Listening comes before the first look: what commits in between is told.
        store.listen()
        store.sync_queues(self._settings.queues, self._named)
        log.info("leading, term %d", term)

    def round(self, now: float) -> float:
        """Hears, repairs, delivers; returns the seconds until the next round at the latest.

        Raises:
            LostLead: another migrator has a higher term.
            StoreUnavailable: PostgreSQL is away, and the lock with it.
        """
        self._live(now)
        told = self._hear(now)
        self._serve(now)
        try:
            if self._bound(now):
                self._repair(now)
                self._look(now, told=told)
        except EpochMismatch as error:
            self._renew(now, error)
        except BrokerUnavailable as error:
            self._lose(now, error)
        # What was told beside the answer to a statement has been read off the socket: nothing would wake us for it.
        self._told = self._listen()
        return 0.0 if self._told else max(0.0, self._next(now) - time.monotonic())

    # --- PostgreSQL's side: the sign of life, what is told, what is served

    def _live(self, now: float) -> None:
        """Says every second or two that this leader lives; beside long work too, else another would take it for a ghost."""
        if now >= self._live_at:
            self._store.keep_lead(self._term)
            self._live_at = now + (LIFE_SECONDS if self._awake else CALM_LIFE_SECONDS)

    def _hear(self, now: float) -> bool:
        """Whether rows became due somewhere; also finds a connection that looks alive and hears nothing."""
        told = self._listen() or self._told
        self._told = False
        if now > self._pinged_at + PING_ANSWER_SECONDS:
            raise StoreUnavailable("a notification to ourselves did not come back")
        if now >= self._ping_at:
            self._store.ping_self()
            self._pinged_at, self._ping_at = now, now + PING_SECONDS
        return told

    def _listen(self) -> bool:
        """Whether others have notified; whatever comes, our own ping among it, shows that the connection hears."""
        told, pings = self._store.notifications(0)
        if told or pings:
            self._pinged_at = float("inf")
        return told > 0

    def _serve(self, now: float) -> None:
        """Learns which queues live instances serve, and makes rows in `job_queues` for those that are new."""
        pulse = self._arena.pulse()
        fresh = pulse is not self._pulse
        news = fresh and any(p["served"] and p["queue_name"] not in self._slots for p in pulse.values())
        if now >= self._served_at or news or not self._slots:
            slots = {queue.name: queue.slots for queue in self._store.served_queues()}
            # Rows may have stayed marked since nobody served the queue: their hints are gone.
            self._owed |= slots.keys() - self._slots.keys()
            self._slots, self._served_at, fresh = slots, now + SERVED_SECONDS, True
        if fresh and (names := (pulse.keys() | self._slots.keys()) - self._named):
            self._store.sync_queues(self._settings.queues, sorted(names))
            self._named |= names

    # --- Redis's side: one life of it, and the hints it lost

    def _bound(self, now: float) -> bool:
        """Whether Redis is there and is the one whose epoch PostgreSQL knows."""
        if self._life is None:
            if now < self._probe_at:
                return False
            self._bind(now)
        elif now >= self._life_at:
            self._check_life(self._life, now)
        return True

    def _bind(self, now: float) -> None:
        """Binds the life of Redis to the row in PostgreSQL; a Redis that does not know the epoch gets a new one.

        The row comes first, the key last: a crash in between finds them different again. Everything marked is offered
        again in any case: nobody knows what was lost.
        """
        run_id, epoch = self._broker.server_life()
        wanted = self._store.redis_epoch()
        if epoch != wanted:
            wanted = self._store.new_redis_epoch(self._term)
            checkpoint("migrator.epoch")
            self._broker.clear_lists([self._key(name, band) for name in self._slots for band in BAND_RANGES])
            self._broker.set_epoch(wanted)
            checkpoint("migrator.bound")
            log.warning("Redis has no data of ours: new epoch %s, everything marked is offered again", wanted)
        self._life, self._bound_at, self._life_at = Life(wanted, run_id), now, now + LIFE_SECONDS
        self._owed |= self._slots.keys()
        self._flows.clear()
        self._look_at = now
        self._arena.redis_down = False
        self._down.set(False)

    def _check_life(self, life: Life, now: float) -> None:
        """A FLUSHALL leaves the run_id and takes the epoch, a restart from a snapshot keeps the epoch and has a new run_id."""
        run_id, epoch = self._broker.server_life()
        self._life_at = now + LIFE_SECONDS
        if epoch != life.epoch:
            raise EpochMismatch("the epoch in Redis is another one")
        if run_id != life.run_id:
            log.warning("Redis was restarted: everything marked is offered again")
            self._life = replace(life, run_id=run_id)
            self._owed |= self._slots.keys()

    def _renew(self, now: float, error: EpochMismatch) -> None:
        """Redis lost its data: a new life at once. Two databases that share one Redis must not chase each other, though."""
        log.info("%s", error)
        self._life = None
        quick = now - self._bound_at < PROBE_SECONDS
        self._probe_at = now + jittered(PROBE_SECONDS, random.random()) if quick else now  # noqa: S311 - no secret

    def _lose(self, now: float, error: BrokerUnavailable) -> None:
        """Redis is away: what is marked stays so, workers claim without hints, and we ask again about every second."""
        self._down.set(True, error)
        self._arena.redis_down = True
        self._life, self._awake = None, False
        self._probe_at = now + jittered(PROBE_SECONDS, random.random())  # noqa: S311 - no secret

    def _repair(self, now: float) -> None:
        """Offers again what may be missing: after a worker's death, for old marks, and whatever is still owed."""
        requests = self._arena.reoffer_requests
        if requests != self._requests:
            self._owed |= self._slots.keys()
            self._requests = requests
        for name, pulse in self._arena.pulse().items():
            again = now >= self._reoffered_at.get(name, float("-inf")) + REOFFER_SECONDS
            # A paused queue is not ready: its hints would be popped for nothing.
            if again and pulse["old_marks"] and pulse["ready"]:
                self._owed.add(name)
        for name in sorted(self._owed):
            if name in self._slots:
                self._reoffer(name, now)
            self._owed.discard(name)

    def _reoffer(self, name: str, now: float) -> None:
        assert self._life is not None, "bound"
        self._reoffered_at[name] = now
        self._live(time.monotonic())
        for band, (low, high) in BAND_RANGES.items():
            ids = self._store.marked(name, low, high, REOFFER_ROWS)
            missing = self._broker.reoffer(self._life.epoch, self._key(name, band), ids) if ids else 0
            if missing:
                flow = self._flows.get((name, band), Flow())
                self._flows[name, band] = replace(flow, length=flow.length + missing)
                metrics.count_reoffered(name, missing)
                checkpoint("migrator.reoffered")
                log.info("%d hints offered again", missing, extra={"queue": name})

    # --- delivering

    def _look(self, now: float, *, told: bool) -> None:
        """Delivers, if there is a reason to look; then decides how closely to go on looking."""
        due = self._due_since(now)
        if not (told or due or self._wakened(now)):
            return
        moved = self._deliver()
        after = time.monotonic()
        self._pace = busier(self._pace, after, after - now if moved else 0.0, moved)
        self._looked_at, self._look_at = now, now + self._settings.migrator.poll_seconds
        self._looks = looked(self._looks, now)
        if due or (told and not moved):
            # More may fall due before the next pulse tells when, and what told us may still be committing.
            self._looks = look_again(self._looks, after)
        self._sleep_or_stay(after)

    def _wakened(self, now: float) -> bool:
        pulse, self._pulse = self._pulse, self._arena.pulse()
        if pulse is not self._pulse and any(p["ready"] for p in self._pulse.values()):
            return True
        return now >= self._look_time(now)

    def _due_since(self, now: float) -> bool:
        """Whether a time that the pulse named has come since the last look."""
        return any(self._looked_at < due <= now for due in self._due_times())

    def _due_times(self) -> Iterator[float]:
        for pulse in self._arena.pulse().values():
            if pulse["due_at"] is not None and pulse["served"]:
                yield pulse["due_at"] + DUE_MARGIN_SECONDS

    def _deliver(self) -> int:
        """Fills every list that has room; returns how many rows were marked."""
        self._measure()
        moved, wanted = 0, list(self._wanted())
        while wanted:
            urgent = self._urgent(time.monotonic())
            most = (
                min(URGENT_BATCH, self._settings.migrator.batch_size)
                if urgent
                else self._settings.migrator.batch_size
            )
            counts = self._move(wanted, most)
            moved += sum(counts)
            wanted = [] if urgent else left_over(wanted, counts, most)
        return moved

    def _urgent(self, now: float) -> bool:
        """Whether jobs of the high band come beside a backlog of others."""
        return now - self._urgent_at < URGENT_SECONDS

    def _deep(self) -> bool:
        """Whether workers of this instance claim straight from PostgreSQL: then few hints do."""
        return any(slot.deep for slot in self._arena.slots)

    def _measure(self) -> None:
        """Asks for the lengths of the lists that may have got room since we last heard."""
        now = time.monotonic()
        keys = {
            self._key(*place): place
            for place, flow in self._flows.items()
            if place[0] in self._slots and asks(flow, self._slots[place[0]], now)
        }
        lengths = self._broker.lengths(list(keys))
        now = time.monotonic()
        for key, length in lengths.items():
            self._flows[keys[key]] = observe(self._flows[keys[key]], length, now)

    def _wanted(self) -> Iterator[Wanted]:
        """What has room, high bands first."""
        deep = self._deep()
        for band in BAND_RANGES:
            for name, slots in self._slots.items():
                count = room(self._flows.get((name, band), Flow()), slots, deep=deep)
                if count:
                    yield Wanted(name, band, count)

    def _move(self, wanted: Sequence[Wanted], most: int) -> list[int]:
        """Marks at most so many, then pushes; returns how many each list got.

        A crash in between leaves marked rows without hints: stolen, or offered again.
        """
        now = time.monotonic()
        self._live(now)
        rooms = [
            Room(each.queue_name, *BAND_RANGES[each.band], each.count, self._behind(each, now))
            for each in wanted
        ]
        redis = self._settings.redis
        marks = self._mark_rows if redis.item == "full" or redis.job_status == "all" else self._store.mark_ids
        marked = marks(self._term, rooms, most=most)
        checkpoint("migrator.marked")
        if marked:
            self._push(
                {(wanted[place].queue_name, wanted[place].band): each for place, each in marked.items()}
            )
            checkpoint("migrator.pushed")
        counts = [marked[place].count if place in marked else 0 for place in range(len(wanted))]
        if any(
            each.band == "high" and 0 < count < each.count for each, count in zip(wanted, counts, strict=True)
        ):
            self._urgent_at = now
        self._remember(wanted, counts, full=sum(counts) >= most)
        for place, each in enumerate(wanted):
            self._reach(each, rooms[place], marked.get(place), now)
        return counts

    def _behind(self, wanted: Wanted, now: float) -> Position | None:
        """The row behind which to begin; none now and then, for what was committed or given back late."""
        reached = self._reached.get((wanted.queue_name, wanted.band))
        return reached.position if reached and now - reached.from_head_at < FROM_HEAD_SECONDS else None

    def _reach(self, wanted: Wanted, room: Room, marked: MarkedList | None, now: float) -> None:
        key = wanted.queue_name, wanted.band
        if marked is None or marked.last is None or not self._flows[key].backlog:
            self._reached.pop(key, None)
        else:
            looked_at = now if room.after is None else self._reached[key].from_head_at
            self._reached[key] = Reached(marked.last, looked_at)

    def _remember(self, wanted: Sequence[Wanted], counts: Sequence[int], *, full: bool) -> None:
        """Which lists have a backlog: those that got all they wanted, and the one at which the batch was full."""
        reached = max(place for place, count in enumerate(counts) if count) if full else len(wanted)
        for place, (each, count) in enumerate(zip(wanted[: reached + 1], counts, strict=False)):
            key = each.queue_name, each.band
            flow = self._flows.get(key, Flow())
            backlog = count >= each.count or place == reached
            if flow.backlog != backlog or key not in self._flows:
                self._flows[key] = replace(flow, backlog=backlog)

    def _mark_rows(self, term: int, rooms: Sequence[Room], *, most: int) -> dict[int, MarkedList]:
        """Marks where more than the ids is wanted: whole items, or the live status of every job."""
        rows = self._store.mark(term, rooms, most=most, full=self._settings.redis.item == "full")
        places = {(each.queue_name, each.low): place for place, each in enumerate(rooms)}
        lists: dict[int, list[Marked]] = {}
        for row in rows:
            place = places[row.queue_name, BAND_RANGES[band_of(row.priority)][0]]
            lists.setdefault(place, []).append(row)
        if self._settings.redis.job_status == "all":
            # Told before the push: afterwards a worker may have told more already.
            at = time.time()
            self._broker.tell([live.migrated(row.id, row.queue_name, row.priority, at) for row in rows])
            for place, each in lists.items():
                self._broker.offered(rooms[place].queue_name, [row.id for row in each])
        return {place: _list_of(each) for place, each in lists.items()}

    def _push(self, marked: Mapping[tuple[str, str], MarkedList]) -> None:
        assert self._life is not None, "bound"
        keys = {self._key(*place): each for place, each in marked.items()}
        try:
            if self._settings.redis.item == "full":
                lengths = self._broker.push(
                    self._life.epoch, [(key, each.items) for key, each in keys.items()]
                )
            else:
                lengths = self._broker.push_ids(
                    self._life.epoch, [(key, each.ids) for key, each in keys.items()]
                )
        finally:  # marked they are in any case; a worker waits for the hint, nobody for the number
            for (name, _), each in marked.items():
                for kind, number in each.kinds.items():
                    metrics.count_migrated(name, kind, number)
        now = time.monotonic()
        for place, each in marked.items():
            flow = self._flows.get(place, Flow(heard=now))
            self._flows[place] = observe(flow, lengths[self._key(*place)], now, each.count)

    def _sleep_or_stay(self, now: float) -> None:
        """Declares the migrator awake while deliveries keep it busy: inserts need not notify then.

        The trigger of a transaction that is in flight at the change may have seen us awake: so after falling asleep we look
        again at growing intervals.
        """
        stays = stays_awake(self._pace, awake=self._awake)
        if stays and (not self._awake or now >= self._awake_at):
            self._store.stay_awake(self._term, AWAKE_SECONDS)
            self._awake_at = now + AWAKE_SECONDS / 2
        elif self._awake and not stays:
            self._store.fall_asleep(self._term)
            self._looks = look_again(None, now)
        self._awake = stays

    def _next(self, now: float) -> float:
        """When the next round is wanted at the latest (monotonic seconds)."""
        times = [self._live_at, self._ping_at, self._pinged_at + PING_ANSWER_SECONDS, self._served_at]
        if self._life is None:
            return min(*times, self._probe_at)
        due = [at for at in self._due_times() if at > self._looked_at]
        return min(*times, *due, self._life_at, self._look_time(now))

    def _look_time(self, now: float) -> float:
        """When to look next, as far as nobody tells."""
        times = [self._look_at]
        if self._looks is not None:
            times.append(self._looks.next)
        deep = self._deep()
        if self._awake and self._urgent(now):
            times.append(self._looked_at + URGENT_LOOK_SECONDS)
        elif self._awake or deep:
            times.append(self._looked_at + (DEEP_LOOK_SECONDS if deep else AWAKE_LOOK_SECONDS))
        for (name, _), flow in self._flows.items():
            if flow.backlog and name in self._slots and not deep:
                times.append(now + look_in(flow, self._slots[name], now))
        return min(times)

    def _key(self, name: str, band: str) -> str:
        return self._broker.queue_key(name, band)


def _list_of(rows: Sequence[Marked]) -> MarkedList:
    return MarkedList(
        ids=" ".join(str(row.id) for row in rows),
        kinds=Counter(row.kind for row in rows),
        items=[row.item for row in rows if row.item is not None],
    )
