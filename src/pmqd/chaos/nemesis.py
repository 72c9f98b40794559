"""Who makes the faults: a schedule by seed, a thread for each fault that acts, and a record of what each hit.

Nothing stays broken: whatever a fault has done is undone when it ends, in whatever way it ends.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import psycopg
from psycopg import sql

from pmqd.chaos.faults import TOGETHER, Action, Area, Eyes, Kind, Missed, Scene, Watch, kinds, note, possible
from pmqd.chaos.pace import PACE, Pace

if TYPE_CHECKING:
    from pmqd.chaos.plan import Plan
    from pmqd.chaos.world import World

log = logging.getLogger(__name__)

AT_ONCE: Final = 3
"""Faults that act at once, at most."""
TRIES: Final = 10
"""How often a fault is tried that finds nothing to hit, later each time: both hosts may be down just now, or PostgreSQL for as long
as a lease."""
LONG_TRIES: Final = 2
LONGEST_PAUSE_SECONDS: Final = 4.0
SHORTEST_GAP_SECONDS: Final = 0.2
LONGEST_GAP_SECONDS: Final = 1.2
GAP_SECONDS: Final = 6.0
"""For how long after a fault the longest time without a claim is looked for."""
_LOOK_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Due:
    """One fault of a schedule.

    Attributes:
        number: its place in it.
        kind: its name.
        at: the part of the load that is done when it is due.
        gap: seconds since the fault before it, at least.
        seed: of its own chance, so that it does the same whatever the others do.
    """

    number: int
    kind: str
    at: float
    gap: float
    seed: int


def schedule(seed: int, faults: int, table: Mapping[str, Kind]) -> list[Due]:
    """Which faults come, and when: the same for the same seed and kinds.

    Every kind comes once before any comes twice by weight. Those that hold for about a lease come first: everything else
    happens beside them.
    """
    random = Random(seed)  # noqa: S311 - chance that can be repeated is the point
    names = sorted(table)
    chosen = _sample(random, names, min(faults, len(names)), table)
    if faults > len(names):
        short = [name for name in names if not table[name].long]
        chosen += random.choices(
            short or names, [table[name].weight for name in short or names], k=faults - len(names)
        )
    random.shuffle(chosen)
    chosen.sort(key=lambda name: not table[name].long)
    return [
        Due(
            number,
            name,
            (number + random.random() / 2) / (len(chosen) + 1),
            random.uniform(SHORTEST_GAP_SECONDS, LONGEST_GAP_SECONDS),
            random.getrandbits(48),
        )
        for number, name in enumerate(chosen)
    ]


def _sample(random: Random, names: Sequence[str], count: int, table: Mapping[str, Kind]) -> list[str]:
    """So many different kinds, the heavier the likelier (Efraimidis and Spirakis)."""
    keyed = sorted(names, key=lambda name: random.random() ** (1 / table[name].weight), reverse=True)
    return keyed[:count]


@dataclass(slots=True)
class FaultRecord:
    """What became of one fault.

    Attributes:
        kind: its name.
        target: what it was done to.
        hit: whether it hit its window.
        window: what it found there.
        began: when it struck (monotonic seconds).
        ended: when it was healed.
        tries: how often it was tried until then.
        recovery_seconds: until the product went on, where that can be said.
        watch: how that is measured.
    """

    kind: str
    target: str = ""
    hit: bool = False
    window: str = ""
    began: float = 0.0
    ended: float = 0.0
    tries: int = 0
    recovery_seconds: float | None = None
    watch: Watch | None = field(default=None, repr=False)


@dataclass(slots=True)
class _Active:
    thread: threading.Thread
    area: Area


class Nemesis:
    """Carries a schedule out."""

    def __init__(
        self, world: World, plan: Plan, log_path: Path, table: Mapping[str, Kind] | None = None
    ) -> None:
        """Takes the world, the plan (its seed, its faults, `only`), and the file of its history."""
        self._world = world
        self._log_path = log_path
        self._eyes = Eyes(world)
        only: Iterable[str] = getattr(plan, "only", ())
        wanted = {name: kind for name, kind in (table or kinds()).items() if not only or name in set(only)}
        self.table, self.refused = possible(world, wanted)
        self.schedule = schedule(plan.seed, plan.faults, self.table) if self.table else []
        self.records: list[FaultRecord] = []
        self._lock = threading.Lock()
        self._away: set[str] = set()
        self._active: list[_Active] = []
        self._stop = threading.Event()

    def run(self, progress: Callable[[], float], stop: threading.Event) -> None:
        """Makes all faults of the schedule, and returns when the last of them is healed, or soon after `stop`.

        Args:
            progress: the part of the load that is done, 0 to 1.
            stop: ends it early; what acts is healed first.
        """
        pace = Pace(progress, len(self.schedule), self._log_path.parent.parent / PACE)
        left = list(self.schedule)
        try:
            while (left or self._acting()) and not stop.is_set():
                pace.tell()
                due = self._next(left, pace)
                if due is None:
                    stop.wait(_LOOK_SECONDS)
                else:
                    left.remove(due)
                    self._begin(due)
                    pace.began()
        finally:
            self._stop.set()
            for each in self._active:
                each.thread.join()
            pace.end()
            self._eyes.close()

    def unmet(self) -> list[str]:
        """Kinds that were planned and never hit their window."""
        hit = {record.kind for record in self.records if record.hit}
        return sorted({due.kind for due in self.schedule} - hit)

    def _next(self, left: Sequence[Due], pace: Pace) -> Due | None:
        """The first fault that is due and may act beside those that do; a long one ahead holds nobody up."""
        if len(self._acting()) >= AT_ONCE:
            return None
        areas = [each.area for each in self._active]
        for due in left[:AT_ONCE]:
            if not pace.is_due(due.at, due.gap):
                return None
            if all(frozenset((self.table[due.kind].area, area)) in TOGETHER for area in areas):
                return due
        return None

    def _begin(self, due: Due) -> None:
        kind = self.table[due.kind]
        thread = threading.Thread(
            target=self._carry_out, args=(due, kind), name=f"fault-{due.number}", daemon=True
        )
        thread.start()
        self._active.append(_Active(thread, kind.area))

    def _acting(self) -> list[_Active]:
        self._active = [each for each in self._active if each.thread.is_alive()]
        return self._active

    def _carry_out(self, due: Due, kind: Kind) -> None:
        """Tries a fault until it hits its window, a few times."""
        record = FaultRecord(kind.name)
        random = Random(due.seed)  # noqa: S311 - as above
        for number in range(LONG_TRIES if kind.long else TRIES):
            if number and self._stop.wait(min(LONGEST_PAUSE_SECONDS, random.uniform(0.1, 0.4) * 2**number)):
                break
            record.tries = number + 1
            self._try(kind, random, record)
            if record.hit:
                break
        with self._lock:
            self.records.append(record)

    def _try(self, kind: Kind, random: Random, record: FaultRecord) -> None:
        action: Action | None = None
        record.began = time.monotonic()
        try:
            with contextlib.ExitStack() as undo:
                scene = Scene(self._world, random, self._eyes, undo, self._away)
                action = kind.begin(scene)
                record.target, record.window, record.watch = action.target, action.window, action.watch
                self._note(kind, "begin", record, action)
                self._hold(action)
                record.hit = action.hit()
        except Missed as error:
            record.hit, record.window = False, str(error)
        except Exception as error:  # one fault that goes wrong must not end the run's other faults
            log.exception("fault %s went wrong", kind.name)
            record.hit, record.window = False, f"{type(error).__name__}: {error}"
        record.ended = time.monotonic()
        if record.watch is not None and record.watch.at is None:
            record.watch = Watch(record.watch.what, time.time(), record.watch.ids)
        self._note(kind, "end", record, action)

    def _hold(self, action: Action) -> None:
        self._stop.wait(action.seconds)
        until = time.monotonic() + action.patience
        while not self._stop.is_set() and not action.over() and time.monotonic() < until:
            self._stop.wait(_LOOK_SECONDS)

    def _note(self, kind: Kind, phase: str, record: FaultRecord, action: Action | None) -> None:
        detail: dict[str, Any] = {"area": str(kind.area), "try": record.tries}
        if action is not None:
            detail |= {"pids": list(action.pids), "stopped": action.stopped}
        note(
            self._log_path,
            fault=kind.name,
            phase=phase,
            target=record.target,
            hit=record.hit,
            window=record.window,
            detail=detail,
        )

    def measure(self) -> None:
        """Fills in what each fault's recovery took, from the recorded transitions; after the drain."""
        watched = [record for record in self.records if record.hit and record.watch is not None]
        if not watched:
            return
        with contextlib.closing(self._world.connect()) as connection:
            try:
                _prepare_claims(connection)
                for record in watched:
                    assert record.watch is not None
                    record.recovery_seconds = _recovery(connection, record.watch)
            except psycopg.errors.UndefinedTable:
                log.warning("no transitions were recorded, so no recovery can be measured")


# --- recovery ------------------------------------------------------------------------------------------------


def _prepare_claims(connection: psycopg.Connection[Any]) -> None:
    """All claims in order of time, once: the recorded transitions have no index before the check."""
    connection.execute(
        "create temporary table chaos_claims as"
        " select extract(epoch from at)::float8 as at, job_id from pmqd_chaos.transitions where new_status = 'running'"
    )
    connection.execute("create index on chaos_claims (at)")
    connection.execute("analyze chaos_claims")


_FIRST: Final = "select min(at) - %(at)s from chaos_claims where at > %(at)s and at < %(at)s + 600"
_OF_THESE: Final = sql.SQL(_FIRST + " and job_id = any(%(ids)s)")
_GAP: Final = sql.SQL(
    "select max(at - before) from (select at, lag(at, 1, %(at)s::float8) over (order by at) as before"
    "  from chaos_claims where at > %(at)s and at < %(at)s + %(seconds)s) c"
)


def _recovery(connection: psycopg.Connection[Any], watch: Watch) -> float | None:
    """Seconds; None where nothing followed."""
    query = {"jobs": _OF_THESE, "claims": sql.SQL(_FIRST), "gap": _GAP}[watch.what]
    parameters = {"at": watch.at, "ids": list(watch.ids), "seconds": GAP_SECONDS}
    row = connection.execute(query, parameters).fetchone()
    return None if row is None or row[0] is None else round(float(row[0]), 4)
