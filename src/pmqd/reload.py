"""A reload, up to the moment where the new generation takes over.

The new configuration is valid before this begins. One canary per pool starts under it, beside the old workers; only
when all of them are ready, their application imported, does anything change for those. Whatever fails before that
moment leaves the old generation as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from pmqd.arena import Kind, Reason
from pmqd.children import Child, ChildState
from pmqd.config import Settings
from pmqd.errors import ConfigError
from pmqd.listener import listen
from pmqd.roster import SERVICE_SLOTS, Generation, Roster, places_of, workers_of


@dataclass
class Reload:
    """A reload that runs; `deadline` is when it must have taken over, and after that when it counts as over."""

    roster: Roster
    fresh: Generation
    canaries: list[Child]
    deadline: float
    switched: bool = False

    @classmethod
    def begin(cls, roster: Roster, settings: Settings, now: float) -> Reload:
        """Start the canaries.

        Raises:
            ConfigError: the new configuration cannot be taken over while running.
        """
        old = roster.generation
        check(roster, settings)
        same = settings.web.listen == old.settings.web.listen
        web_socket = old.web_socket if same else listen(settings.web.listen)
        fresh = Generation(settings, old.number + 1, web_socket, places_of(settings))
        pools = [place for place in fresh.places if place.kind == Kind.WORKER]
        canaries = [roster.add(place, fresh, now, canary=True) for place in pools]
        return cls(roster, fresh, canaries, now + 2 * settings.boot_seconds)

    def advance(self, now: float) -> str | None:
        """Take over once all canaries are ready; the reason, where that cannot be any more."""
        dead = [canary for canary in self.canaries if canary.state == ChildState.STOPPED]
        if dead:
            self.give_up(now)
            return f"the first {dead[0]} of the new generation {dead[0].fate or 'ended'}"
        if all(canary.state == ChildState.RUNNING for canary in self.canaries):
            self._switch(now)
        elif now >= self.deadline:
            self.give_up(now)
            return "the new generation did not become ready in time"
        return None

    def _switch(self, now: float) -> None:
        roster, old = self.roster, self.roster.generation
        changed = kinds_concerned(old.settings, self.fresh.settings)
        for child in roster.children:
            if child.generation != self.fresh.number and child.place.kind in changed:
                child.retiring = child.retiring or Reason.DRAINED
        for canary in self.canaries:
            canary.canary = False
        roster.generation = self.fresh
        if old.web_socket is not None and old.web_socket is not self.fresh.web_socket:
            old.web_socket.close()  # the old web child has its own copy until it stops
        self.switched = True
        self.deadline = now + 2 * self.fresh.settings.boot_seconds

    def give_up(self, now: float) -> None:
        """Strike off the canaries and what was made for them."""
        for canary in self.canaries:
            canary.canary = False
            if canary.state not in (ChildState.STOPPED, ChildState.FATAL):
                self.roster.stop(canary, now, Reason.DRAINED)
        old = self.roster.generation
        if self.fresh.web_socket is not None and self.fresh.web_socket is not old.web_socket:
            self.fresh.web_socket.close()


def check(roster: Roster, settings: Settings) -> None:
    """Can the running family take this configuration over?

    Raises:
        ConfigError: it needs more than was set aside at the start, or another folder.
    """
    arena, old = roster.family.arena, roster.generation.settings
    room = len(arena.slots) - SERVICE_SLOTS - len(settings.workers)
    wanted = workers_of(places_of(settings))
    if wanted > room:
        raise ConfigError(
            f"workers: {wanted} processes; at most {room} without a restart (twice those of the start)"
        )
    for pool in settings.workers:
        if pool.concurrency > arena.entries:
            raise ConfigError(
                f"workers.{pool.name}.concurrency = {pool.concurrency}: at most {arena.entries} without a restart"
            )
    if settings.state_dir != old.state_dir:
        raise ConfigError(f"state_dir = {str(settings.state_dir)!r}: changes with a restart only")


def kinds_concerned(old: Settings, new: Settings) -> set[Kind]:
    """Which children a new configuration replaces.

    Workers always, as their code may have changed; maintenance too where the pools differ, as it tells the database what
    the instance serves; all where anything else differs.
    """
    if old.model_dump(exclude={"workers"}) != new.model_dump(exclude={"workers"}):
        return set(Kind)
    return {Kind.WORKER} if old.workers == new.workers else {Kind.WORKER, Kind.MAINTENANCE}
