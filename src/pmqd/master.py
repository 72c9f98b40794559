"""The master: forks the children, reaps them, watches the clock, hears signals, talks to systemd. Nothing else.

It has no threads, no connections and no application code, and uses neither store nor broker: whatever it touched, every
child would inherit. Their code it reads in for its children and never calls. What it knows about jobs it reads in the arena.

    STARTING ──► RUNNING ⇄ RELOADING
        └───────────┴──────────┴──► DRAINING ──► KILLING ──► STOPPED      (only forward)

STARTING ends when every kind has one ready child. RELOADING ends when the new generation is complete, or was given up;
it leads back to STARTING where that has not ended yet (a first configuration that does not work may be replaced).
DRAINING ends when nobody is left; a second SIGTERM or SIGINT makes it KILLING, where only maintenance, which gives back what
the others held, has a moment to go by itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import select
import socket
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from signal import Signals
from typing import Any
from uuid import uuid4

import setproctitle

from pmqd import config, logs
from pmqd.arena import Arena, Kind, Reason
from pmqd.children import SPECS, ChildSpec, Family
from pmqd.config import Settings
from pmqd.crashpoints import checkpoint
from pmqd.errors import PmqdError
from pmqd.kernel import threads
from pmqd.listener import listen
from pmqd.process import become_subreaper, kill_marked
from pmqd.reload import Reload
from pmqd.report import describe, headline
from pmqd.roster import SERVICE_SLOTS, Generation, Roster, places_of, worker_slots, workers_of
from pmqd.signals import Inbox
from pmqd.statedir import open_state_dir
from pmqd.systemd import Notifier

log = logging.getLogger(__name__)
LONGEST_TURN = 0.5
CALM_TURN = 1.0
RESCUE_SECONDS = 5.0
HASTY_RESCUE_SECONDS = 2.0
LEAST_ENTRIES = 32
LIBRARIES = ("psycopg", "psycopg.types.json", "redis", "pydantic", "prometheus_client")


class Phase(StrEnum):
    """See the top of this file."""

    STARTING = "starting"
    RUNNING = "running"
    RELOADING = "reloading"
    DRAINING = "draining"
    KILLING = "killing"
    STOPPED = "stopped"


NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.STARTING: frozenset({Phase.RUNNING, Phase.RELOADING, Phase.DRAINING}),
    Phase.RUNNING: frozenset({Phase.RELOADING, Phase.DRAINING}),
    Phase.RELOADING: frozenset({Phase.STARTING, Phase.RUNNING, Phase.DRAINING}),
    Phase.DRAINING: frozenset({Phase.KILLING, Phase.STOPPED}),
    Phase.KILLING: frozenset({Phase.STOPPED}),
    Phase.STOPPED: frozenset(),
}
STOPPING = (Phase.DRAINING, Phase.KILLING)


def run(
    settings: Settings,
    config_path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    specs: Mapping[Kind, ChildSpec] = SPECS,
) -> int:
    """Be the master of one instance, until it is told to stop.

    Args:
        settings: the configuration to begin with.
        config_path: where SIGHUP reads it again; None: where `config.load` finds it.
        overrides: what the command line said, over each reading.
        specs: what each kind of child runs.

    Returns:
        The exit code: 0 after a stop by signal, CONFIG or SCHEMA when a child ended with it.

    Raises:
        ConfigError: state_dir is in use or cannot be used, or the web address cannot be bound.
    """
    logs.configure(settings.log, "master")
    master = Master(settings, config_path, overrides or {}, dict(specs))
    try:
        return master.run()
    finally:
        master.close()


class Master:
    """One instance's master."""

    def __init__(
        self,
        settings: Settings,
        config_path: Path | None,
        overrides: Mapping[str, Any],
        specs: dict[Kind, ChildSpec],
    ) -> None:
        self._source = config_path, overrides
        self.state = open_state_dir(settings.state_dir)
        web_socket = listen(settings.web.listen)
        self.arena = make_arena(settings)
        self.arena.instance_id = self._written = uuid4()
        self.state.write_instance(self._written)
        self._death_read, self._death_write = os.pipe2(os.O_CLOEXEC)
        self._notifier = Notifier.from_environment()
        self._inbox = Inbox()
        family = Family(self.arena, self.state, socket.gethostname(), self._death_read, self._forget, specs)
        generation = Generation(settings, 1, web_socket, places_of(settings))
        self.roster = Roster(family, generation, time.monotonic())
        self.phase = Phase.STARTING
        self._reload: Reload | None = None
        self._reload_asked = False
        self._exit_code = 0
        self._extra = 0
        self._rescue_deadline = float("inf")
        self._next_watchdog = 0.0
        self._up = False
        self._turn_due = float("inf")

    def run(self) -> int:
        """The loop. Each turn takes what happened in a fixed order: signals, deaths, clocks, then what is missing."""
        self._settle_in()
        while self.phase != Phase.STOPPED:
            now = time.monotonic()
            self.roster.fence()  # first of all: this turn may come after a long sleep of the whole machine
            self.arena.beat_master()
            self._hear(self._inbox.take(), now)
            self.roster.reap(now, stopping=self.phase in STOPPING)
            self.roster.watch(now, lag=max(0.0, now - self._turn_due))
            self._advance(now)
            self._start_missing(now)
            self._tell_systemd(now)
            self._wait(now)
        log.info("stopped")
        return self._exit_code

    def _settle_in(self) -> None:
        setproctitle.setproctitle("pmqd: master")
        become_subreaper()
        # Once here, so that no child spends its first half second on it, nor memory of its own.
        for library in LIBRARIES:
            importlib.import_module(library)
        for spec in self.roster.family.specs.values():
            spec.preload()
        gc.collect()
        gc.freeze()  # what the children share stays shared: their collector does not write to it
        if threads() > 1:
            log.warning(
                "the master has %d threads; forked children may inherit a lock that nobody gives back",
                threads(),
            )
        log.info("pmqd starts: %s", describe_plan(self.roster.generation))

    # events

    def _hear(self, signals: list[Signals], now: float) -> None:
        for number in signals:
            if number in (Signals.SIGTERM, Signals.SIGINT):
                self._on_stop(number, now)
            elif number == Signals.SIGHUP:
                self._on_hangup()
            elif number == Signals.SIGUSR1:
                for line in describe(self.roster, self.phase, now):
                    log.info("%s", line)
            elif number in (Signals.SIGTTIN, Signals.SIGTTOU):
                self._on_resize(1 if number == Signals.SIGTTIN else -1)

    def _on_stop(self, number: Signals, now: float) -> None:
        """The first drains, the second kills all but maintenance, the third kills that too."""
        if self.phase not in STOPPING:
            log.info("%s: draining, at most %g s", number.name, self.roster.generation.settings.drain_seconds)
            self._drain(now)
        elif self.phase == Phase.DRAINING:
            log.warning("%s again: stopping now", number.name)
            self._set_phase(Phase.KILLING)
            self._rescue_deadline = now + HASTY_RESCUE_SECONDS
            for child in self.roster.alive(Kind.WORKER, Kind.MIGRATOR, Kind.WEB):
                child.kill(Reason.DRAINED)
        else:
            for child in self.roster.alive():
                child.kill(Reason.DRAINED)

    def _on_hangup(self) -> None:
        if self.phase in STOPPING:
            log.warning("SIGHUP: not while stopping")
        else:
            self._reload_asked = True  # taken up when a reload that runs is over

    def _on_resize(self, step: int) -> None:
        generation = self.roster.generation
        if self.phase in STOPPING or not generation.settings.workers:
            return
        places = places_of(generation.settings, self._extra + step)
        before, after = workers_of(generation.places), workers_of(places)
        room = len(self.arena.slots) - SERVICE_SLOTS - len(generation.settings.workers)
        if after == before or after > room:
            log.warning(
                "the first pool stays as it is: %d workers, from one to %d are possible", before, room
            )
            return
        log.info("%d workers become %d, until the next reload", before, after)
        self._extra += step
        self.roster.generation = Generation(
            generation.settings, generation.number, generation.web_socket, places
        )

    # phases

    def _set_phase(self, phase: Phase) -> None:
        if phase not in NEXT[self.phase]:
            raise ValueError(f"the master does not go from {self.phase} to {phase}")
        log.info("%s -> %s", self.phase, phase)
        self.phase = phase

    def _advance(self, now: float) -> None:
        if self.roster.fatal is not None and self.phase not in STOPPING:
            self._exit_code = self.roster.fatal
            self._drain(now)
        if self.phase == Phase.STARTING and self._complete(1):
            self._set_phase(Phase.RUNNING)
            self._up = True
            self._notifier.ready()
            log.info("ready: %s", headline(self.roster, now))
        if self.phase == Phase.RELOADING:
            self._advance_reload(now)
        elif self._reload_asked and self.phase in (Phase.STARTING, Phase.RUNNING):
            self._begin_reload(now)
        if self.phase in STOPPING:
            self._advance_stop(now)

    def _complete(self, at_least: int | None = None) -> bool:
        """Has each place its ready children (all of them, or so many)?"""
        places = [place for place in self.roster.generation.places if place.count]
        return all(len(self.roster.ready(place)) >= (at_least or place.count) for place in places)

    def _begin_reload(self, now: float) -> None:
        self._reload_asked = False
        self._set_phase(Phase.RELOADING)
        if self._up:
            self._notifier.reloading()
        try:
            self._reload = Reload.begin(self.roster, self._read_settings(), now)
            checkpoint("master.reloading")
        except PmqdError as error:
            self._end_reload(f"reload refused, the old configuration stays in force: {error}", failed=True)

    def _read_settings(self) -> Settings:
        path, overrides = self._source
        return config.load(path, overrides)

    def _advance_reload(self, now: float) -> None:
        reload = self._reload
        assert reload is not None
        if not reload.switched:
            self._await_canaries(reload, now)
        elif self._complete() or now >= reload.deadline:
            self._end_reload(f"reload done: {headline(self.roster, now)}")

    def _await_canaries(self, reload: Reload, now: float) -> None:
        failure = reload.advance(now)
        if failure:
            self._end_reload(f"reload failed, the old generation stays: {failure}", failed=True)
        elif reload.switched:
            checkpoint("master.switched")
            self._extra = 0
            logs.configure(self.roster.generation.settings.log, "master")
            log.info("generation %d takes over: %s", reload.fresh.number, describe_plan(reload.fresh))

    def _end_reload(self, text: str, *, failed: bool = False) -> None:
        log.log(logging.ERROR if failed else logging.INFO, "%s", text)
        self._reload = None
        self._set_phase(Phase.RUNNING if self._up else Phase.STARTING)
        if self._up:
            self._notifier.ready()
        self._notifier.status(text)

    def _drain(self, now: float) -> None:
        """Workers finish what they run and the migrator stops; web and maintenance go after them."""
        if self._reload is not None and not self._reload.switched:
            self._reload.give_up(now)
        self._reload = None
        self._set_phase(Phase.DRAINING)
        self.arena.draining = True
        seconds = self.roster.generation.settings.drain_seconds
        self._notifier.stopping(extend_seconds=seconds + 2 * RESCUE_SECONDS + 10)
        for child in list(self.roster.children):
            # Nobody is started any more, but maintenance: a dead one comes back, for the rescue.
            idle = not child.alive and child.place.kind != Kind.MAINTENANCE
            if idle or child.place.kind in (Kind.WORKER, Kind.MIGRATOR):
                self.roster.stop(child, now, Reason.DRAINED)
                if child.patient:  # it was being replaced, with all the time that its job takes; not any more
                    child.patient, child.deadline = False, now + seconds
        checkpoint("master.draining")

    def _advance_stop(self, now: float) -> None:
        roster = self.roster
        if roster.alive(Kind.WORKER):
            return
        if self._rescue_deadline == float("inf"):
            self._rescue_deadline = now + RESCUE_SECONDS
        for child in roster.alive(Kind.WEB):
            roster.stop(child, now, Reason.DRAINED)
        if not roster.unrescued() or now >= self._rescue_deadline:
            for child in roster.children:
                roster.stop(child, now, Reason.DRAINED)
        if not roster.alive():
            if roster.unrescued():
                log.warning("%d dead workers were not rescued; the next start does it", roster.unrescued())
            self._set_phase(Phase.STOPPED)

    def _start_missing(self, now: float) -> None:
        if self.phase == Phase.STOPPED:
            return
        if self.phase in STOPPING:
            self.roster.start_due(now, Kind.MAINTENANCE)  # a dead one is needed once more, to rescue
            return
        self.roster.balance(now)
        self.roster.start_due(now)

    # the outside

    def _tell_systemd(self, now: float) -> None:
        interval = self._notifier.watchdog_interval
        if interval is not None and now >= self._next_watchdog:
            self._notifier.watchdog()
            self._next_watchdog = now + interval
        if self.phase in (Phase.STARTING, *STOPPING):
            self._notifier.status(f"{self.phase}: {headline(self.roster, now)}")
        if self.arena.instance_id != self._written:  # maintenance took a new identity after a lost lease
            self._written = self.arena.instance_id
            self.state.write_instance(self._written)

    def _wait(self, now: float) -> None:
        if self.phase == Phase.STOPPED:
            return
        moments = [self.roster.next_deadline(now)]
        if self._notifier.watchdog_interval is not None:
            moments.append(self._next_watchdog)
        calm = self.phase == Phase.RUNNING and self.roster.calm
        seconds = min(max(min(moments) - now, 0.0), CALM_TURN if calm else LONGEST_TURN)
        self._turn_due = now + seconds
        poller = select.poll()
        poller.register(self._inbox.fileno(), select.POLLIN)
        poller.register(self.arena.bell_master, select.POLLIN)
        poller.poll(seconds * 1000)
        self.arena.answer(self.arena.bell_master)

    def _forget(self, kept: socket.socket | None) -> None:
        """In a fresh child: close what is the master's alone."""
        self._inbox.forget()
        self._notifier.close()
        os.close(self._death_write)
        sockets = {self.roster.generation.web_socket, self._reload.fresh.web_socket if self._reload else None}
        for other in sockets - {kept, None}:
            assert other is not None
            other.close()

    def close(self) -> None:
        """Leave nothing: whoever still lives is killed, whatever happened in the loop."""
        for child in self.roster.alive():
            child.kill(Reason.DRAINED)
        while self.roster.alive():
            self.roster.reap(time.monotonic(), stopping=True)
            self._wait_for_the_dead()
        kill_marked(self.roster.family.mark)
        self._inbox.close()
        self._notifier.close()
        for fd in (self._death_read, self._death_write):
            os.close(fd)
        if self.roster.generation.web_socket is not None:
            self.roster.generation.web_socket.close()
        self.state.close()

    def _wait_for_the_dead(self) -> None:
        with contextlib.suppress(InterruptedError):
            select.select([self._inbox.fileno()], [], [], 0.05)
        self._inbox.take()


def make_arena(settings: Settings) -> Arena:
    """An arena with room for the configuration and for a reload of it."""
    concurrency = max((pool.concurrency for pool in settings.workers), default=1)
    return Arena.create(worker_slots(settings) + SERVICE_SLOTS, max(LEAST_ENTRIES, 2 * concurrency))


def describe_plan(generation: Generation) -> str:
    """What a generation asks for, in one line."""
    pools = [f"{place.count} in pool {place.pool.name!r}" for place in generation.places if place.pool]
    return f"workers: {', '.join(pools) or 'none'}; web on {generation.settings.web.listen}"
