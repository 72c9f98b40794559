"""Maintenance: the instance's lease, the pulse, rescue, and the partitions.

Rescue is a standing condition and not a message: whatever a beat shows as held by somebody who does not live is given
back, in this beat or a later one. So a claim that commits after its worker's death is found too. The master's word only
makes it prompt.
"""

import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

from pmqd import metrics, served
from pmqd.arena import LIVE, Kind, Reason, Slot, State
from pmqd.errors import ConfigError, PmqdError, SchemaError, StoreUnavailable
from pmqd.job import Action, Outcome
from pmqd.logs import Edge
from pmqd.process import ChildContext, checkpoint, run_loop
from pmqd.recovery import (
    Death,
    SavedSettlesError,
    TickWatch,
    Verdict,
    judge,
    load_outcomes,
    logged_outcome,
    put_aside,
    saved_by,
    saved_settles,
    stalled_tick,
    watch_tick,
)
from pmqd.store import Beat, Fate, Rescued, StatementError, Store
from pmqd.window import jittered

log = logging.getLogger(__name__)

BEAT_SECONDS = 1.0
PAUSE_SECONDS = 0.5
MASTER_ALIVE_SECONDS = 15.0
PARTITIONS_SECONDS = 3600.0
PARTITIONS_RETRY_SECONDS = 60.0
CLEANING_SECONDS = 2.0
SETTLE_BATCH = 500
NEAR_SECONDS = 2.0


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
        self._store = Store(context.settings.postgres, "maintenance")
        self._previous = context.previous_instance
        self._judged: dict[str, Verdict] = {}  # of dead workers, until a beat sees nothing more of them
        self._registered: Registration | None = None
        self._beat_at = self._rest_until = 0.0
        self._holding = False
        self._watch: TickWatch | None = None
        self._partitions_at = 0.0
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
            self._rescue_dead()
            if self._arena.draining and not any(slot.live for slot in self._workers()):
                self._store.unregister(self._arena.instance_id)
        except PmqdError as error:
            log.warning("left without signing off: %s", error)

    def close(self) -> None:
        """Ends the connection; a cleaning under way gets a moment to end its batch, the rest is for the next time."""
        if self._keeper is not None:
            self._keeper.join(CLEANING_SECONDS)
        self._store.close()

    def _turn(self, now: float) -> None:
        # The lease comes first: nothing that goes wrong in a rescue may cost it. Strays and orphans come last: what was
        # saved for their jobs has been applied by then.
        self._register(self._arena.instance_id)
        beat = self._beat(now) if now >= self._beat_at else None
        self._rescue_dead()
        self._rescue_previous()
        if beat is not None:
            self._rescue_strays(beat)
        self._keep_partitions(now)

    def _rest(self, now: float, error: StoreUnavailable) -> float:
        """PostgreSQL is away. No lease ages meanwhile: it counts ticks that are made only while PostgreSQL is writable."""
        self._arena.store_down = True
        self._away.set(True, error)
        self._watch = None
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
            self._beat_at = 0.0
        self._registered = wanted
        self._arena.ring(self._arena.bell_migrator)

    def _served(self) -> tuple[list[str], list[str], dict[str, Any]]:
        """Queues, kinds and pools. Only workers import applications: what a pool without a list serves, and the kinds, they tell."""
        told = served.read(self._context.state_dir)
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
        beat = self._store.beat(instance_id, holding=holding, stalled_tick=stalled_tick(self._watch, now))
        if beat.lost:
            self._take_new_identity(instance_id)
            return None
        self._publish(beat, now)
        return beat

    def _publish(self, beat: Beat, now: float) -> None:
        """What the beat told, for all children of this instance."""
        arena = self._arena
        arena.lease_renewed()
        # Only a beat proves that PostgreSQL is there: a round between two beats may have asked it nothing.
        arena.store_down = False
        self._away.set(False)
        if beat.ticking and not self._holding:
            log.info("ticking from tick %d on", beat.tick)
        self._holding, self._watch = beat.ticking, watch_tick(self._watch, beat.tick, now)
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
        self._arena.instance_id = new
        self._holding, self._watch = False, None
        log.warning("the lease of instance %s was lost; going on as instance %s", old, new)

    # --- rescue

    def _workers(self) -> list[Slot]:
        return [slot for slot in self._arena.slots if slot.kind == Kind.WORKER]

    def _rescue_dead(self) -> None:
        """Gives back what the dead held.

        Settles that they saved speak for jobs that are done, so those come first; and who is dead is looked up before
        them, so that nobody saves in between.
        """
        dead = [slot for slot in self._workers() if slot.state == State.DEAD]
        applied = self._settle_saved(dead)
        for slot in dead:
            self._rescue(slot, applied)

    def _rescue(self, slot: Slot, applied: set[UUID]) -> None:
        found = slot.death()
        if found is None:
            return
        death = Death(
            worker_id=slot.worker_id,
            reason=found.reason,
            exit_code=found.exit_code,
            running=tuple(job.job_id for job in slot.running()),
            settling=tuple(slot.unsettled()),
            culprit=found.culprit,
        )
        verdict = judge(death)
        self._judged[death.worker_id] = verdict
        rescued = self._carry_out(death.worker_id, verdict)
        checkpoint("maintenance.rescued")
        account(rescued, verdict.cause)
        self._credit(death, applied | {job.job_id for job in rescued})
        slot.rescued()
        if found.reason != Reason.BOOT:
            # Hints that it had popped are nowhere now; their rows are still marked.
            self._arena.request_reoffer()

    def _carry_out(self, worker_id: str, verdict: Verdict) -> list[Rescued]:
        return self._store.rescue(
            worker_id,
            fates=verdict.fates,
            default=verdict.default,
            cause=verdict.cause,
            alone=verdict.alone,
        )

    def _rescue_strays(self, beat: Beat) -> None:
        """Gives back claims whose worker is in no slot: they were under way when it died, so nothing of them was started.

        The arena is read after the beat: an id that the beat saw and the arena does not know is dead. A row that could not be
        written when its worker was rescued comes here too: the verdict stands until it could be.
        """
        known = {slot.worker_id for slot in self._workers() if slot.state in (*LIVE, State.DEAD)}
        for worker_id in beat.claim_workers:
            if worker_id not in known:
                cause = f"worker {worker_id} died before its claim was answered"
                verdict = self._judged.get(worker_id) or Verdict({}, Fate.UNSTARTED, cause)
                account(self._carry_out(worker_id, verdict), verdict.cause)
        self._judged = {name: found for name, found in self._judged.items() if name in beat.claim_workers}
        if beat.orphans and beat.ticking:
            cause = "the lease of the instance that ran it ran out"
            account(self._store.rescue_orphans(cause), cause)

    def _rescue_previous(self) -> None:
        """What the last family in our state_dir held: we hold its lock, so none of it lives."""
        if self._previous is not None:
            cause = f"instance {self._previous} ended without giving it back"
            account(self._store.rescue_instance(self._previous, cause), cause)
            self._previous = None

    def _credit(self, death: Death, counted: set[UUID]) -> None:
        """Counts what the dead had settled without hearing the answer, as `job_logs` has it."""
        settled = [job_id for job_id in death.settling if job_id not in counted]
        jobs = filter(None, (self._store.show_job(job_id) for job_id in settled))
        metrics.count_outcomes(filter(None, (logged_outcome(job, death.worker_id) for job in jobs)))

    # --- settles that outlived their process

    def _settle_saved(self, dead: Sequence[Slot]) -> set[UUID]:
        """Applies what the dead could not settle, this family's and the last one's; returns the jobs in question.

        A worker that lives still settles by itself: its file is left alone.
        """
        applied: set[UUID] = set()
        for path in saved_settles(self._context.state_dir):
            if any(slot.live and saved_by(path, slot.worker_id) for slot in self._workers()):
                continue
            owner = next((slot for slot in dead if saved_by(path, slot.worker_id)), None)
            try:
                outcomes, closed_tokens = load_outcomes(path)
                self._settle(outcomes, closed_tokens, None if owner is None else set(owner.unsettled()))
                checkpoint("maintenance.settled")
                path.unlink()
            except (SavedSettlesError, StatementError, OSError) as error:
                # Whatever is wrong with one file, all others and the rescue must not wait for it.
                put_aside(path, error)
                continue
            applied |= {outcome.job_id for outcome in outcomes}
        return applied

    def _settle(
        self, outcomes: Sequence[Outcome], closed_tokens: Sequence[UUID], uncounted: set[UUID] | None
    ) -> None:
        """Applies one file. Repeated after a crash in the middle it changes nothing: every settle is guarded by its token.

        Args:
            outcomes: what the file holds.
            closed_tokens: claims that are over with it.
            uncounted: jobs that the worker had heard no answer for; None when nobody knows, which counts as all.
        """
        batches = [outcomes[at : at + SETTLE_BATCH] for at in range(0, len(outcomes), SETTLE_BATCH)] or [[]]
        applied = refused = 0
        for number, batch in enumerate(batches, start=1):
            # A claim is closed with the last of its jobs, else the rest would be out of rescue's sight.
            statuses = self._settle_batch(batch, closed_tokens if number == len(batches) else [])
            missing = [outcome for outcome in batch if outcome.job_id not in statuses]
            # The worker's own sending may have been committed without an answer.
            before = self._store.settled_ids(missing) if missing else set()
            metrics.count_outcomes(batch, statuses)
            metrics.count_outcomes(
                each
                for each in missing
                if each.job_id in before and (uncounted is None or each.job_id in uncounted)
            )
            applied += len(statuses) + len(before)
            refused += len(missing) - len(before)
        metrics.count_stale(refused)
        log.info("%d saved settles applied, %d refused", applied, refused)

    def _settle_batch(self, batch: Sequence[Outcome], closed_tokens: Sequence[UUID]) -> dict[UUID, str]:
        """Settles; one outcome that PostgreSQL cannot store must not keep the others from being settled."""
        try:
            return self._store.settle(batch, closed_tokens)
        except StatementError as error:
            if len(batch) > 1:
                statuses: dict[UUID, str] = {}
                for outcome in batch:
                    statuses |= self._settle_batch([outcome], [])
                return statuses | self._store.settle([], closed_tokens)
            text = f"the job's end could not be written: {error}"
            log.error("job %s: %s", batch[0].job_id, text)  # noqa: TRY400 - it says all in its one line
            return self._store.settle(
                [replace(batch[0], action=Action.FAIL, result=None, error=text)], closed_tokens
            )

    # --- partitions

    def _keep_partitions(self, now: float) -> None:
        """Only where the tick is made, in a thread with its own connection: a long DELETE must not hold up the lease."""
        idle = self._keeper is None or not self._keeper.is_alive()
        if self._holding and idle and now >= self._partitions_at:
            self._partitions_at = now + PARTITIONS_SECONDS
            self._keeper = threading.Thread(target=self._keep_partitions_once, name="partitions", daemon=True)
            self._keeper.start()

    def _keep_partitions_once(self) -> None:
        store = Store(self._context.settings.postgres, "partitions")
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


def account(rescued: Sequence[Rescued], cause: str) -> None:
    """Counts and logs what a rescue gave back.

    Args:
        rescued: the store's answer.
        cause: what happened to the owner.
    """
    if not rescued:
        return
    metrics.count_rescued(rescued)
    for job in rescued:
        if job.status == "failed":
            metrics.count_poisoned(job.queue_name)
            log.error(
                "job failed, its attempts are used up: %s",
                cause,
                extra={"job_id": str(job.job_id), "queue": job.queue_name},
            )
    log.warning("%d jobs given back: %s", len(rescued), cause)
