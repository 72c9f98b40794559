"""Maintenance: the instance's lease, the pulse, rescue, and the partitions.

Rescue is a standing condition and not a message: whatever a beat shows as held by somebody who does not live is given
back, in this beat or a later one. So a claim that commits after its worker's death is found too. The master's word only
makes it prompt.
"""

import logging
import math
import os
import random
import threading
import time
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

from pmqd import fence, served
from pmqd.arena import Kind, boottime
from pmqd.crashpoints import checkpoint
from pmqd.errors import ConfigError, PmqdError, SchemaError, StoreUnavailable
from pmqd.logs import Edge
from pmqd.process import ChildContext, run_loop
from pmqd.recovery import (
    TickWatch,
    stalled_tick,
    watch_tick,
)
from pmqd.rescue import Rescuer
from pmqd.statedir import forget_instance
from pmqd.store import Beat, StatementError, Store
from pmqd.window import jittered

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
PAUSE_SECONDS = 0.5
MASTER_ALIVE_SECONDS = 15.0
PARTITIONS_SECONDS = 3600.0
PARTITIONS_RETRY_SECONDS = 60.0
CLEANING_SECONDS = 2.0
NEAR_SECONDS = 2.0
FROZEN_SECONDS = 10.0
"""For how long PostgreSQL waits for the rest of a worker's transaction; as long as it would wait for a session that is idle in one."""
FROZEN_LOOK_SECONDS = 2.0
CALM_FROZEN_LOOK_SECONDS = 10.0
"""The same while nobody here holds or waits for anything, as far as the last beat saw."""


def main(context: ChildContext) -> None:
    """Runs maintenance until it is told to stop.

    Raises:
        SchemaError: the database's schema is not the one this program knows; ends the master.
    """
    maintenance = Maintenance(context)
    context.report_ready()
    try:
        run_loop(context, maintenance.poll)
        maintenance.leave()
    finally:
        maintenance.close()


@dataclass(frozen=True, slots=True)
class Registration:
    """What an instance says of itself."""

    instance_id: UUID
    queues: list[str]
    kinds: list[str]
    pools: dict[str, Any]


class Maintenance:
    """One instance's maintenance; outlives the absence of PostgreSQL."""

    def __init__(self, context: ChildContext) -> None:
        self._context = context
        self._arena = context.arena
        self._store = Store(context.settings.postgres, "maintenance", newest=context.arena)
        self._previous = list(context.previous_instances)
        self._rescuer = Rescuer(self._store, self._arena, context.state_dir)
        self._told = served.Reader(context.state_dir)
        self._registered: Registration | None = None
        self._beat_at = self._rest_until = 0.0
        self._holding = False
        self._watch: TickWatch | None = None
        fenced = fence.is_wanted(context.settings)
        self._refusals = fence.Refusals(self._arena, context.settings.postgres.direct) if fenced else None
        self._partitions_at = 0.0
        self._looked_at = -math.inf
        self._calm = False
        self._keeper: threading.Thread | None = None
        self._away = Edge(log, "PostgreSQL is away", "PostgreSQL is back")
        self._orphaned = Edge(
            log, "the master's loop stands still, the lease is not renewed", "the master's loop turns"
        )

    def poll(self, now: float) -> float:
        """One round; returns the seconds until the next one at the latest."""
        if now < self._rest_until:
            return self._rest_until - now
        try:
            self._turn(now)
        except (ConfigError, SchemaError):
            raise
        except StoreUnavailable as error:
            return self._rest(now, error)
        except Exception:  # rescue must go on, whatever went wrong this time
            log.exception("unexpected error; going on in a second")
            self._rest_until = now + BEAT_SECONDS
            return BEAT_SECONDS
        return self._beat_at - time.monotonic()

    def leave(self) -> None:
        """The last round of a clean stop: nothing of the dead is left behind, and the lease ends where nobody needs it.

        When only this child is replaced (a reload), the workers live on, and the lease with them.
        """
        try:
            self._rescuer.dead()
            workers = (slot for slot in self._arena.slots if slot.kind == Kind.WORKER)
            if self._arena.draining and not any(slot.live for slot in workers):
                checkpoint("maintenance.leaving")
                self._store.unregister(self._arena.instance_id)
        except PmqdError as error:
            log.warning("left without signing off: %s", error)
            self._rescuer.save_noted()

    def close(self) -> None:
        """Ends the connection; a cleaning under way gets a moment to end its batch, the rest is for the next time."""
        if self._keeper is not None:
            self._keeper.join(CLEANING_SECONDS)
        self._store.close()

    def _turn(self, now: float) -> None:
        self._end_frozen(now)  # before all else: the lease may wait for their locks
        # Then the lease: nothing that goes wrong in a rescue may cost it. Strays and orphans come last: what was
        # saved for their jobs has been applied by then.
        self._register(self._arena.instance_id)
        beat = self._beat(now) if now >= self._beat_at else None
        self._rescuer.dead()
        while self._previous:
            self._rescuer.previous(self._previous[-1])
            forget_instance(self._context.state_dir, self._previous.pop())
        if beat is not None:
            self._rescuer.strays(beat)
        self._keep_partitions(now)

    def _rest(self, now: float, error: StoreUnavailable) -> float:
        """PostgreSQL is away. No lease ages meanwhile: it counts ticks that are made only while PostgreSQL is writable."""
        self._arena.store_down = True
        self._away.set(True, error)
        self._watch = None
        if self._refusals is not None:
            self._refusals.hear()
        wait = jittered(PAUSE_SECONDS, random.random())  # noqa: S311 - no secret
        self._rest_until = now + wait
        return wait

    # --- the lease

    def _register(self, instance_id: UUID) -> None:
        """Says which instance serves what: at the start, under a new identity, and when the workers have told more."""
        wanted = Registration(instance_id, *self._served())
        if wanted == self._registered:
            return
        self._store.register(
            instance_id,
            host=self._context.host,
            pid=os.getppid(),
            queues=wanted.queues,
            kinds=wanted.kinds,
            pools=wanted.pools,
        )
        if self._registered is None or self._registered.instance_id != instance_id:
            # Not at once where another maintenance beat a moment ago: two ticks are at least a second apart.
            self._beat_at = time.monotonic() + BEAT_SECONDS - self._arena.lease_age(time.monotonic())
        checkpoint("maintenance.registered")
        self._registered = wanted
        self._arena.ring(self._arena.bell_migrator)

    def _served(self) -> tuple[list[str], list[str], dict[str, Any]]:
        """Queues, kinds and pools. Only workers import applications: what a pool without a list serves, and the kinds, they tell."""
        told = self._told.read()
        queues: set[str] = set()
        kinds: set[str] = set()
        pools = {}
        for pool in self._context.settings.workers:
            said = told.get(pool.name, served.Served())
            names = pool.queues or said.queues
            queues.update(names)
            kinds.update(said.kinds)
            pools[pool.name] = {"queues": names, "processes": pool.processes, "concurrency": pool.concurrency}
        return sorted(queues), sorted(kinds), pools

    def _beat(self, now: float) -> Beat | None:
        """Beats while the master lives: an instance whose master stands still must not keep its jobs for ever."""
        stale = self._arena.master_age(now) >= MASTER_ALIVE_SECONDS
        self._orphaned.set(stale)
        # No catching up: two ticks are at least a second apart, however late the first one was.
        self._beat_at = now + BEAT_SECONDS
        if stale:
            self._watch = None
            return None
        instance_id = self._arena.instance_id
        # One that knows of no tick yet offers to go on with its instance's ticking: it may have taken another's place.
        holding = self._holding or self._watch is None
        asked = boottime()
        beat = self._store.beat(instance_id, holding=holding, stalled_tick=stalled_tick(self._watch, now))
        checkpoint("maintenance.beaten")
        if beat.lost:
            self._take_new_identity(instance_id)
            return None
        self._publish(beat, now, asked)
        return beat

    def _publish(self, beat: Beat, now: float, asked: float) -> None:
        """What the beat told, for all children of this instance."""
        arena = self._arena
        arena.lease_renewed(asked)
        # Only a beat proves that PostgreSQL is there: a round between two beats may have asked it nothing.
        arena.store_down = False
        self._away.set(False)
        if self._refusals is not None:
            self._refusals.over()
        if beat.ticking and not self._holding:
            log.info("ticking from tick %d on", beat.tick)
        self._holding, self._watch = beat.ticking, watch_tick(self._watch, beat.tick, now)
        # Nobody here waits for a frozen session's locks then. Of other instances a beat tells what is ready, not what they hold.
        self._calm = not beat.claims and not any(p.ready or p.old_marks for p in beat.pulse)
        arena.set_pulse(beat.pulse)
        arena.cancels = beat.cancels
        if any(
            p.ready or p.old_marks or (p.due_in_seconds or NEAR_SECONDS) < NEAR_SECONDS for p in beat.pulse
        ):
            arena.ring(arena.bell_migrator)

    def _take_new_identity(self, old: UUID) -> None:
        """The lease ran out: others may have taken our jobs. What runs keeps its tokens, and its settles decide."""
        new = uuid4()
        self._register(new)
        checkpoint("maintenance.renamed")
        self._arena.instance_id = new
        self._holding, self._watch = False, None
        log.warning("the lease of instance %s was lost; going on as instance %s", old, new)

    def _end_frozen(self, now: float) -> None:
        """Before all that would wait for their locks. Where the tick is made, one look for all instances; anywhere when beats fail."""
        every = CALM_FROZEN_LOOK_SECONDS if self._calm and not self._arena.store_down else FROZEN_LOOK_SECONDS
        if not (self._holding or self._arena.store_down) or now < self._looked_at + every:
            return
        self._looked_at = now
        try:
            ended = self._store.end_frozen(FROZEN_SECONDS)
        except (SchemaError, StatementError) as error:
            # An administrator may have kept pg_terminate_backend() from us.
            self._looked_at = math.inf
            log.warning("sessions of workers that stand still in a transaction cannot be ended: %s", error)
            return
        for pid, waited in ended:
            log.warning("ended session %d of a worker that stopped in a transaction %.0f s ago", pid, waited)

    # --- partitions

    def _keep_partitions(self, now: float) -> None:
        """Only where the tick is made, in a thread with its own connection: a long DELETE must not hold up the lease."""
        idle = self._keeper is None or not self._keeper.is_alive()
        if self._holding and idle and now >= self._partitions_at:
            self._partitions_at = now + PARTITIONS_SECONDS
            self._keeper = threading.Thread(target=self._keep_partitions_once, name="partitions", daemon=True)
            self._keeper.start()

    def _keep_partitions_once(self) -> None:
        store = Store(self._context.settings.postgres, "partitions", newest=self._context.arena)
        try:
            store.keep_partitions(self._context.settings.maintenance)
        except Exception as error:  # the next try is near, and nothing else hangs on it
            self._partitions_at = time.monotonic() + PARTITIONS_RETRY_SECONDS
            log.warning(
                "partitions were not kept, next try in a minute: %s",
                error,
                exc_info=not isinstance(error, PmqdError),
            )
        finally:
            store.close()
