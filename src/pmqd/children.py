"""The table of kinds of children, one child's states, and how one is forked.

A child is a place that a process fills: it outlives the deaths of its processes.

    BACKOFF ── delay over ──► STARTING ── ready ──► RUNNING ── told to ──► STOPPING ── exited ──► STOPPED
       ▲                          │ died               │ died
       └──────────────────────────┴────────────────────┘
              death with exit code CONFIG or SCHEMA (not of a canary) ──► FATAL

What the state does not tell is why a child ends: that is `verdict` where the master kills it for a cause, and
`retiring` where it gives way to another or is not wanted any more.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.context import ForkProcess
from uuid import UUID

from pmqd import fence, logs
from pmqd.arena import Arena, Kind, Reason, Slot
from pmqd.config import PoolSettings, Settings
from pmqd.errors import ExitCode, PmqdError
from pmqd.process import ChildContext, Inheritance, enter, kill_group, leave
from pmqd.restart import Backoff
from pmqd.statedir import METRICS, StateDir

log = logging.getLogger(__name__)
CONTEXT = multiprocessing.get_context("fork")
FATAL_CODES = (ExitCode.CONFIG, ExitCode.SCHEMA)
Main = Callable[[ChildContext], int | None]


@dataclass(frozen=True)
class ChildSpec:
    """One kind of child.

    Attributes:
        kind: its name.
        main: `module:function`, whose code the master only reads in; or a function.
        hung_seconds: without progress for so long, and with no job running, it is killed; see `must_progress`.
        must_progress: progress is owed from the start; else only once there was any.
        overlap: a new one may run beside the one that it replaces.
        stop_seconds: how long it may take to stop; None: as long as a drain may.
        metrics: open the process's metric files before anything else is imported.
    """

    kind: Kind
    main: str | Main
    hung_seconds: float = 60.0
    must_progress: bool = False
    overlap: bool = True
    stop_seconds: float | None = 5.0
    metrics: bool = True

    def preload(self) -> None:
        """Reads the code in and runs none of it, before the first fork: what the master has read is in memory once for all children."""
        if isinstance(self.main, str):
            with contextlib.suppress(ImportError):  # the child will say it, and be tried again
                importlib.import_module(self.main.partition(":")[0])

    def load(self) -> Main:
        """The main function; imports it."""
        if not isinstance(self.main, str):
            return self.main
        module, _, name = self.main.partition(":")
        main: Main = getattr(importlib.import_module(module), name)
        return main


SPECS: dict[Kind, ChildSpec] = {
    spec.kind: spec
    for spec in (
        # In the order in which they are started: the lease comes first.
        ChildSpec(Kind.MAINTENANCE, "pmqd.maintenance:main", overlap=False, stop_seconds=10.0),
        ChildSpec(Kind.MIGRATOR, "pmqd.migrator:main"),
        ChildSpec(Kind.WORKER, "pmqd.worker:main", hung_seconds=15.0, must_progress=True, stop_seconds=None),
        ChildSpec(Kind.WEB, "pmqd.web:main"),
    )
}


class ChildState(StrEnum):
    """See the top of this file."""

    BACKOFF = "backoff"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FATAL = "fatal"


S = ChildState
TRANSITIONS: dict[ChildState, frozenset[ChildState]] = {
    S.BACKOFF: frozenset({S.STARTING, S.STOPPED}),
    S.STARTING: frozenset({S.RUNNING, S.STOPPING, S.BACKOFF, S.STOPPED, S.FATAL}),
    S.RUNNING: frozenset({S.STOPPING, S.BACKOFF, S.STOPPED, S.FATAL}),
    S.STOPPING: frozenset({S.STOPPED, S.FATAL}),
    S.STOPPED: frozenset(),
    S.FATAL: frozenset(),
}
ALIVE = (S.STARTING, S.RUNNING, S.STOPPING)


@dataclass(frozen=True)
class Place:
    """What is wanted of one kind: a service (one of it), or a pool (so many)."""

    kind: Kind
    count: int = 1
    pool: PoolSettings | None = None
    pool_index: int = -1

    @property
    def key(self) -> tuple[Kind, str]:
        """Which children fill this place, over all generations."""
        return self.kind, self.pool.name if self.pool else ""


@dataclass
class Child:
    """One child. Moments are time.monotonic(); `deadline` is the one of its state (boot, stop, end of the delay)."""

    spec: ChildSpec
    place: Place
    settings: Settings
    generation: int
    canary: bool = False
    state: ChildState = S.BACKOFF
    deadline: float = 0.0
    kill_at: float | None = None
    slot: Slot | None = None
    process: ForkProcess | None = None
    ready_at: float | None = None
    retiring: Reason | None = None
    verdict: Reason | None = None
    culprit: UUID | None = None
    killed: bool = False
    patient: bool = False
    web_socket: socket.socket | None = None
    backoff: Backoff = field(default_factory=Backoff)
    max_jobs: int = 0
    started_at: float = 0.0
    fate: str = ""
    """How its last process ended."""
    told: str = ""
    """The last ending that was logged, so that a crash loop is told once per change."""

    def __str__(self) -> str:
        number = f" {self.slot.index}" if self.slot and self.place.kind == Kind.WORKER else ""
        pool = f" of pool {self.place.pool.name!r}" if self.place.pool else ""
        return f"{self.place.kind}{number}{pool}" + (f" (pid {self.pid})" if self.process else "")

    @property
    def pid(self) -> int:
        """Of the process; 0 while there is none."""
        return (self.process.pid or 0) if self.process else 0

    @property
    def alive(self) -> bool:
        """Is there a process that was not reaped yet?"""
        return self.state in ALIVE

    def set_state(self, state: ChildState, deadline: float = 0.0) -> None:
        """The one way to move a child; refuses what the table does not allow."""
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"{self}: {self.state} does not become {state}")
        log.debug("%s: %s -> %s", self, self.state, state)
        self.state = state
        self.deadline = deadline

    def signal(self, number: signal.Signals) -> None:
        """Signal the process; one that was just reaped is passed over."""
        if self.process is not None and self.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self, verdict: Reason | None = None, culprit: UUID | None = None) -> None:
        """SIGKILL to the process and all that it started in its group; the first verdict stands."""
        if verdict and not self.verdict:
            self.verdict, self.culprit = verdict, culprit
        if self.process is not None and self.process.exitcode is None:
            self.killed = True
            kill_group(self.pid)
            self.signal(signal.SIGKILL)  # user code may have taken the process out of its group


@dataclass(frozen=True)
class Family:
    """What all children of the master are born with."""

    arena: Arena
    state: StateDir
    host: str
    death_read: int
    forget: Callable[[socket.socket | None], None]
    specs: dict[Kind, ChildSpec]

    @property
    def mark(self) -> str:
        """Beginning of all worker ids of this instance."""
        return f"{self.host}:{self.arena.instance_id.hex[-8:]}:"


def fork(child: Child, slot: Slot, sequence: int, family: Family) -> None:
    """Fill a child's place with a new process, in a free slot.

    Signals stay blocked in the child until it has handlers of its own: none is lost, none runs the master's.

    Raises:
        OSError: the system has no process to give; the slot is free again.
    """
    worker_id = f"{family.mark}w{slot.index}.{sequence}"
    place = child.place
    slot.open(
        place.kind,
        worker_id,
        pool=place.pool.name if place.pool else "",
        pool_index=place.pool_index,
        generation=child.generation,
    )
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        inherited = _inheritance(child, slot, family, set(map(signal.Signals, mask)))
        process = CONTEXT.Process(target=_run, args=(child, slot, family, inherited), daemon=False)
        process.start()
    except OSError:
        slot.free()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    with contextlib.suppress(OSError):  # the child does the same: whoever is first
        os.setpgid(process.pid or 0, process.pid or 0)
    slot.pid = process.pid or 0
    child.process, child.slot = process, slot
    child.ready_at = child.verdict = child.culprit = child.kill_at = None
    child.killed = False


def _inheritance(child: Child, slot: Slot, family: Family, mask: set[signal.Signals]) -> Inheritance:
    pool = f" ({child.place.pool.name})" if child.place.pool else ""
    number = f" {slot.index}" if child.place.pool else ""
    keep = {family.death_read, family.state.lock_fd, *family.arena.bells}
    if child.web_socket is not None:
        keep.add(child.web_socket.fileno())
    return Inheritance(
        master_pid=os.getpid(),
        title=f"pmqd: {child.place.kind}{number}{pool}",
        death_read=family.death_read,
        family_mark=family.mark,
        keep=frozenset(keep),
        forget=functools.partial(family.forget, child.web_socket),
        fenced=fence.is_wanted(child.settings),
        mask=mask,
    )


def _run(child: Child, slot: Slot, family: Family, inherited: Inheritance) -> None:
    """What the new process does from its first to its last line."""
    stop = enter(child.place.kind, slot, family.arena, inherited)
    context = ChildContext(
        settings=child.settings,
        arena=family.arena,
        slot=slot,
        worker_id=slot.worker_id,
        kind=child.place.kind,
        pool=child.place.pool,
        pool_index=child.place.pool_index,
        web_socket=child.web_socket,
        stop=stop,
        state_dir=family.state.path,
        host=family.host,
        previous_instances=family.state.previous,
        max_jobs=child.max_jobs,
    )
    logs.configure(child.settings.log, f"{child.place.kind}-{slot.index}")
    try:
        if child.spec.metrics:
            importlib.import_module("pmqd.metrics").start(
                family.state.path / METRICS, f"{child.place.kind}-{slot.index}"
            )
        leave(child.spec.load()(context))
    except PmqdError as error:
        log.error("%s", error)  # noqa: TRY400 - an error on purpose says all in its one line
        leave(error.exit_code)
    except Exception:
        log.exception("%s ends after an error that it did not expect", child.place.kind)
        leave(ExitCode.FAILED)


def classify(child: Child, exit_code: int, *, oom: bool) -> Reason:
    """Why a process ended.

    Args:
        child: with the state that it had when it died.
        exit_code: of the process; negative is a signal.
        oom: the kernel's count of memory kills moved since the last look.
    """
    # Where another child killed it in the master's place, the slot says so.
    isolated = child.slot is not None and child.slot.isolated
    if child.verdict or isolated:
        return child.verdict or Reason.ISOLATED
    if exit_code == -signal.SIGKILL and oom and not child.killed:
        return Reason.OOM
    if child.state == S.STOPPING and exit_code == 0:
        return child.retiring or Reason.DRAINED
    if child.ready_at is None and child.state != S.STOPPING:
        return Reason.BOOT
    if exit_code < 0:
        return Reason.SIGNAL
    return Reason.RECYCLED if exit_code == 0 else Reason.ERROR
