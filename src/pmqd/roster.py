"""The children of an instance: who is wanted, who is there, who died of what, who has to go.

Each turn of the master's loop calls `reap`, `watch`, `balance` and `start_due`, in this order. What they decide rests on
the arena and the clock alone.
"""

from __future__ import annotations

import logging
import random
import signal
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from pmqd import fence
from pmqd.arena import Kind, Reason, Slot, State
from pmqd.children import FATAL_CODES, Child, ChildState, Family, Place, classify, fork
from pmqd.config import Settings
from pmqd.errors import ExitCode
from pmqd.kernel import oom_kills, reap_strangers, rss_kb
from pmqd.process import kill_group, kill_marked
from pmqd.restart import Ending, after_death, jittered
from pmqd.signals import name_of

log = logging.getLogger(__name__)
S = ChildState
ABORT_SECONDS = 1.0
UNREADY_STOP_SECONDS = 2.0
MEASURE_SECONDS = 2.0
LAG_SECONDS = 2.0
SERVICE_SLOTS = 8
LEAST_WORKER_SLOTS = 8


def places_of(settings: Settings, extra: int = 0) -> list[Place]:
    """What a configuration asks for.

    Args:
        settings: the configuration.
        extra: workers more (or less) in the first pool, as SIGTTIN and SIGTTOU asked.
    """
    pools = [
        Place(Kind.WORKER, max(1, pool.processes + extra) if index == 0 else pool.processes, pool, index)
        for index, pool in enumerate(settings.workers)
    ]
    return [Place(Kind.MAINTENANCE), Place(Kind.MIGRATOR), *pools, Place(Kind.WEB)]


def workers_of(places: Iterable[Place]) -> int:
    """Worker processes that these places ask for."""
    return sum(place.count for place in places if place.kind == Kind.WORKER)


def worker_slots(settings: Settings) -> int:
    """Slots for workers: twice what is wanted, so that a whole generation can be replaced beside the old one."""
    return max(LEAST_WORKER_SLOTS, 2 * workers_of(places_of(settings)))


def moves(wanted: int, keep: int, ready: int, old: int, leaving: int, *, overlap: bool) -> tuple[int, int]:
    """How many of one place to start, and how many of its old ones to stop, now.

    Args:
        wanted: how many there are to be.
        keep: those that are to stay, ready or not.
        ready: of those, the ready ones.
        old: those that are to give way and were not told yet.
        leaving: those that were told and are not gone yet.
        overlap: the new one first, then the old one goes; else the old one goes first.
    """
    if not overlap:
        return (0 if old + leaving else max(0, wanted - keep)), old
    starts = max(0, min(wanted - keep, wanted + 1 - keep - old))
    return starts, max(0, min(old, ready + old - wanted))


@dataclass(frozen=True)
class Generation:
    """What is in force: a configuration, its number, the web socket made for it, and what it asks for."""

    settings: Settings
    number: int
    web_socket: socket.socket | None
    places: list[Place]


class Roster:
    """All children, dead or alive, and the slots they stand in."""

    def __init__(self, family: Family, generation: Generation, now: float) -> None:
        self.family = family
        self.generation = generation
        self.children: list[Child] = []
        self.fatal: ExitCode | None = None
        self._sequence = 0
        self._oom_kills = oom_kills()
        self._next_measure = now
        self._judge_after = now
        self._short_of_slots = False

    # who is there

    def of(self, place: Place) -> list[Child]:
        """The children that fill a place, canaries of a coming generation left out."""
        return [child for child in self.children if child.place.key == place.key and not child.canary]

    def alive(self, *kinds: Kind) -> list[Child]:
        """Children with a process, of these kinds (all, where none is named)."""
        return [child for child in self.children if child.alive and (not kinds or child.place.kind in kinds)]

    def ready(self, place: Place) -> list[Child]:
        """Children of a place that can work and are to stay."""
        return [child for child in self.of(place) if child.state == S.RUNNING and not child.retiring]

    def unrescued(self) -> int:
        """Dead workers whose claims maintenance has not given back yet."""
        return sum(slot.state == State.DEAD for slot in self._slots(Kind.WORKER))

    # deaths

    def reap(self, now: float, *, stopping: bool = False) -> None:
        """Take in the dead: name the cause, bury them in the arena, decide what fills their place."""
        ended = [(child, child.process.exitcode) for child in self.alive() if child.process is not None]
        dead = [(child, code) for child, code in ended if code is not None]
        oom = bool(dead) and oom_kills() > self._oom_kills
        for child, code in dead:
            self._bury(child, code, now, oom=oom, stopping=stopping)
        if dead:
            self.family.arena.ring(self.family.arena.bell_maintenance)
            self.children = [child for child in self.children if child.state != S.STOPPED or child.canary]
        reap_strangers({child.pid for child in self.alive()})

    def _bury(self, child: Child, code: int, now: float, *, oom: bool, stopping: bool) -> None:
        slot, process = child.slot, child.process
        assert slot is not None
        assert process is not None
        kill_group(child.pid)  # what its jobs started and left behind
        kill_marked(slot.worker_id + "\0")
        reason = classify(child, code, oom=oom)
        running = slot.running()
        slot.bury(code, reason, child.culprit)
        if child.place.kind != Kind.WORKER:
            slot.free()  # a service holds no claims
        ending = Ending(
            ready_seconds=None if child.ready_at is None else now - child.ready_at,
            in_job=bool(running),
            clean=code == 0,
            killed_outside=code == -signal.SIGKILL and not child.killed and reason != Reason.OOM,
        )
        self._after(child, code, reason, ending, now, stopping=stopping)
        process.close()
        child.process = child.slot = None

    def _after(
        self, child: Child, code: int, reason: Reason, ending: Ending, now: float, *, stopping: bool
    ) -> None:
        child.fate = f"ended: {name_of(code)}, reason {reason}"
        said = f"{child} {child.fate}"
        if code in FATAL_CODES and not child.canary and not child.killed:
            log.error("%s; it cannot work with this configuration or schema, so all stop", said)
            self.fatal = ExitCode(code)
            child.set_state(S.FATAL)
        elif self._is_over(child, stopping=stopping):
            expected = reason in (Reason.DRAINED, Reason.RECYCLED) and not child.killed
            log.log(logging.INFO if expected else logging.WARNING, "%s", said)
            child.set_state(S.STOPPED)
        else:
            child.backoff = after_death(child.backoff, ending, random.random())  # noqa: S311 - spreads restarts
            self._tell(child, said, f"{name_of(code)} {reason} {child.backoff.step}")
            child.set_state(S.BACKOFF, now + child.backoff.delay)

    @staticmethod
    def _is_over(child: Child, *, stopping: bool) -> bool:
        """Nothing takes its place, or something else does already."""
        if stopping:
            return child.place.kind != Kind.MAINTENANCE or child.state == S.STOPPING
        return child.canary or child.retiring is not None or child.state == S.STOPPING

    @staticmethod
    def _tell(child: Child, said: str, ending: str) -> None:
        """A loop of equal deaths at the longest delay is told once."""
        if child.told != ending or not child.backoff.step:
            delay = f"in {child.backoff.delay:.1f} s" if child.backoff.delay else "now"
            log.warning("%s; starts again %s", said, delay)
        child.told = ending

    # watching the living

    def fence(self) -> None:
        """End the processes that run jobs which must not outlive the instance's lease, before it can run out."""
        for child in self.alive(Kind.WORKER):
            slot = child.slot
            assert slot is not None
            if not child.verdict and (jobs := fence.doomed(self.family.arena, slot)):
                slot.isolated = True
                child.kill(Reason.ISOLATED)
                log.error(
                    "%s: %d jobs must not outlive the lease, last renewed %.1f s ago; killed",
                    child,
                    len(jobs),
                    self.family.arena.lease_spent(),
                )

    def watch(self, now: float, lag: float) -> None:
        """Find the ready, the overdue, the hung, those that do not start or stop, and those that have served long.

        Args:
            now: time.monotonic().
            lag: how much later than planned this turn of the loop began. After a freeze of the whole family (a suspended
                machine, a stopped cgroup) the children are given time to act on their own deadlines first.
        """
        if lag > LAG_SECONDS:
            log.warning("the loop stood still for %.1f s; nobody is judged for a while", lag)
            self._judge_after = now + self.generation.settings.timeout_grace_seconds + LAG_SECONDS
        for child in self.alive():
            self._watch_ready(child, now)
            if child.kill_at is not None and now >= child.kill_at:
                child.kill()
            if now >= self._judge_after and not child.verdict:
                self._judge_state(child, now)
                self._judge_jobs(child, now)
            self._recycle(child)
        if now >= self._next_measure:
            self._next_measure = now + MEASURE_SECONDS
            self._measure()

    @staticmethod
    def _watch_ready(child: Child, now: float) -> None:
        assert child.slot is not None
        if child.state == S.STARTING and child.slot.ready:
            child.ready_at = now
            child.set_state(S.RUNNING)
            log.info("%s is ready after %.2f s", child, now - child.started_at)

    @staticmethod
    def _judge_state(child: Child, now: float) -> None:
        assert child.slot is not None
        if child.state == S.RUNNING or now < child.deadline:
            return
        if child.state == S.STARTING:
            log.error("%s did not become ready within %g s; killed", child, child.settings.boot_seconds)
            child.kill(Reason.BOOT)
        elif child.patient and child.slot.running():
            child.deadline = now + 1.0  # the job's own deadline ends it, not our wish for a fresh process
        else:
            log.warning("%s did not stop in time; killed", child)
            child.kill(Reason.DRAINED)

    def _judge_jobs(self, child: Child, now: float) -> None:
        slot = child.slot
        assert slot is not None
        if child.verdict:
            return
        running = slot.running()
        overdue = [job for job in running if job.deadline is not None and job.deadline <= now]
        if overdue:
            culprit = min(overdue, key=lambda job: job.deadline or now)
            log.warning(
                "%s: job %s is past its hard deadline after %.1f s; killed",
                child,
                culprit.job_id,
                now - culprit.started,
            )
            child.kill(Reason.TIMEOUT, culprit.job_id)
        elif child.ready_at is not None and not running and self._is_hung(child, slot, now):
            log.error("%s made no progress for %.0f s; aborted", child, slot.progress_age(now))
            child.verdict, child.kill_at, child.killed = Reason.HUNG, now + ABORT_SECONDS, True
            child.signal(signal.SIGABRT)

    @staticmethod
    def _is_hung(child: Child, slot: Slot, now: float) -> bool:
        # report_ready() is the first progress: a child that owes no more has exactly one.
        watched = child.spec.must_progress or slot.progress_count > 1
        return watched and slot.progress_age(now) > child.spec.hung_seconds

    def _measure(self) -> None:
        self._oom_kills = oom_kills()
        for child in self.alive():
            assert child.slot is not None
            child.slot.rss_kb = rss_kb(child.pid)

    @staticmethod
    def _recycle(child: Child) -> None:
        pool, slot = child.place.pool, child.slot
        if pool is None or slot is None or child.retiring or child.state != S.RUNNING:
            return
        if child.max_jobs and slot.jobs_done >= child.max_jobs:
            log.info("%s has done %d jobs; another takes its place", child, slot.jobs_done)
            child.retiring = Reason.RECYCLED
        elif pool.max_memory_mb and slot.rss_kb > pool.max_memory_mb * 1024:
            log.info("%s takes %d MiB; another takes its place", child, slot.rss_kb // 1024)
            child.retiring = Reason.RECYCLED

    # filling places

    def balance(self, now: float) -> None:
        """Bring each place to what is wanted: new ones first, then the old ones are told to stop."""
        for place in self.generation.places:
            self._balance(place, now)
        wanted = {place.key for place in self.generation.places}
        for child in self.children:
            if child.place.key not in wanted and not child.canary and child.state != S.STOPPING:
                self.stop(child, now, Reason.DRAINED, patient=True)
        self.children = [child for child in self.children if child.state != S.STOPPED or child.canary]

    def _balance(self, place: Place, now: float) -> None:
        mine = [child for child in self.of(place) if child.state not in (S.STOPPED, S.FATAL)]
        leaving = [child for child in mine if child.state == S.STOPPING]
        keep = [child for child in mine if child not in leaving and not child.retiring]
        for surplus in keep[place.count :]:
            surplus.retiring = Reason.DRAINED
        keep = keep[: place.count]
        old = [child for child in mine if child.retiring and child not in leaving]
        ready = sum(child.state == S.RUNNING for child in keep)
        overlap = self.family.specs[place.kind].overlap
        starts, stops = moves(place.count, len(keep), ready, len(old), len(leaving), overlap=overlap)
        for _ in range(starts):
            self.add(place, self.generation, now)
        idle = [child for child in old if not child.alive]
        for child in [*idle, *(child for child in old if child.alive)][: max(stops, len(idle))]:
            self.stop(child, now, child.retiring or Reason.DRAINED, patient=True)

    def add(self, place: Place, generation: Generation, now: float, *, canary: bool = False) -> Child:
        """A new child for a place; it starts with the next `start_due`."""
        spec = self.family.specs[place.kind]
        child = Child(spec, place, generation.settings, generation.number, canary=canary, deadline=now)
        child.web_socket = generation.web_socket if place.kind == Kind.WEB else None
        self.children.append(child)
        return child

    def stop(self, child: Child, now: float, reason: Reason, *, patient: bool = False) -> None:
        """Tell a child to stop.

        Args:
            child: any child; one without a process is struck off.
            now: time.monotonic().
            reason: drained or recycled.
            patient: a job that runs may take its own time, as long as its own deadline allows.
        """
        if child.state in (S.STOPPED, S.FATAL):
            return
        child.retiring = child.retiring or reason
        if not child.alive:
            child.set_state(S.STOPPED)
        elif child.state != S.STOPPING:
            child.patient = patient
            child.set_state(S.STOPPING, now + self._stop_seconds(child))
            child.signal(signal.SIGTERM)

    @staticmethod
    def _stop_seconds(child: Child) -> float:
        if child.slot is not None and not child.slot.ready:
            return UNREADY_STOP_SECONDS  # nothing was begun that could be finished
        return child.settings.drain_seconds if child.spec.stop_seconds is None else child.spec.stop_seconds

    def start_due(self, now: float, *kinds: Kind) -> None:
        """Fork whoever waits and may; without a free slot they wait on."""
        self.family.arena.backoff = sum(
            child.state == S.BACKOFF and child.deadline > now and child.place.kind == Kind.WORKER
            for child in self.children
        )
        waiting = [child for child in self.children if child.state == S.BACKOFF and child.deadline <= now]
        for child in waiting:
            if kinds and child.place.kind not in kinds:
                continue
            slot = self._free_slot(child.place.kind)
            if slot is None:
                self._no_slot(child)
                continue
            self._start(child, slot, now)

    def _start(self, child: Child, slot: Slot, now: float) -> None:
        pool = child.place.pool
        self._sequence += 1
        child.max_jobs = jittered(pool.max_jobs if pool else 0, random.random())  # noqa: S311 - spreads recycling
        try:
            fork(child, slot, self._sequence, self.family)
        except OSError as error:
            child.backoff = after_death(child.backoff, Ending(ready_seconds=None), 0.5)
            log.error("%s cannot be started: %s", child, error.strerror)  # noqa: TRY400 - one line says all
            child.deadline = now + max(child.backoff.delay, 0.1)
            return
        self._short_of_slots = False
        child.started_at = now
        child.set_state(S.STARTING, now + child.settings.boot_seconds)

    def _slots(self, kind: Kind) -> list[Slot]:
        slots = self.family.arena.slots
        return slots[:-SERVICE_SLOTS] if kind == Kind.WORKER else slots[-SERVICE_SLOTS:]

    def _free_slot(self, kind: Kind) -> Slot | None:
        # Not by the slot's own word alone: a job may have written over that of a worker that lives.
        taken = {child.slot.index for child in self.alive() if child.slot is not None}
        for slot in self._slots(kind):
            if slot.state in (State.FREE, State.RESCUED) and slot.index not in taken:
                return slot
        return None

    def _no_slot(self, child: Child) -> None:
        if not self._short_of_slots:
            log.warning(
                "%s waits for a slot: %d dead workers are not rescued yet, %d of %d slots are in use",
                child,
                self.unrescued(),
                sum(slot.live for slot in self._slots(child.place.kind)),
                len(self._slots(child.place.kind)),
            )
        self._short_of_slots = True

    # deadlines

    @property
    def calm(self) -> bool:
        """Whether all children are ready and none has work: then nothing can be overdue soon."""
        return all(
            child.state == S.RUNNING and child.slot is not None and child.slot.state == State.IDLE
            for child in self.children
        )

    def next_deadline(self, now: float) -> float:
        """The moment at which one of the decisions above may fall.

        A moment that has passed was taken in already, or waits for something that rings (a free slot); what nobody foresaw
        is seen by the turn every half second, or second while all is calm.
        """
        moments = [
            child.deadline for child in self.children if child.state in (S.BACKOFF, S.STARTING, S.STOPPING)
        ]
        moments += [child.kill_at for child in self.alive() if child.kill_at is not None]
        for child in self.alive(Kind.WORKER):
            assert child.slot is not None
            moments += [job.deadline for job in child.slot.running() if job.deadline is not None]
        return min((moment for moment in moments if moment > now), default=float("inf"))
