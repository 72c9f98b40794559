"""Every child's first steps, and the loop that children share.

The order of the first steps matters. The master forks with all signals blocked, so nothing is lost before the
child has its own handlers. Before anything of the application is imported the child has made sure that it cannot
outlive its master: the kernel kills a worker whose master died, and a thread in every child waits for the end of the
death pipe to kill what the kernel does not, the processes that jobs started. Connections are opened after all this.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import random
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import setproctitle

from pmqd import fence
from pmqd.arena import Arena, Kind, Slot, State
from pmqd.config import PoolSettings, Settings

PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Sent to a whole process group by a terminal or by mistake; a child's orders come from its master alone.
DEAF_SIGNALS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGTTIN)
WORKER_OOM_SCORE = 300
MAX_PID = 2**22
FENCE_LOOK_SECONDS = 1.0
MARK = "_PMQD_WORKER"
"""Environment variable that tells which worker started a program."""


class StopFlag:
    """Has this child been told to stop? Set by SIGTERM (or SIGINT), once and for ever.

    `fileno()` becomes readable even while the main thread sits in a long C call: the byte is written by the signal
    itself, before any Python handler can run. Other signals with a Python handler make it readable too; whoever wakes
    asks `is_set()`, which takes their bytes away.
    """

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._set = False

    def fileno(self) -> int:
        """Readable once the flag is set, and stays so."""
        return self._read

    def is_set(self) -> bool:
        """Is the child to stop? Any thread may ask."""
        if not self._set:
            with contextlib.suppress(BlockingIOError):
                if any(number in STOP_SIGNALS for number in os.read(self._read, 4096)):
                    self.set()
        return self._set

    def set(self) -> None:
        """Tell this process to stop."""
        self._set = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, bytes([signal.SIGTERM]))

    def wait(self, seconds: float) -> bool:
        """Wait for the flag, at most so long; is it set?"""
        deadline = time.monotonic() + seconds
        while not self.is_set() and (left := deadline - time.monotonic()) > 0:
            select.select([self._read], [], [], left)
        return self.is_set()

    def listen(self) -> None:
        """Let signals of this process (main thread, after the fork) set the flag."""
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: self.set())

    def close(self) -> None:
        """Give the pipe back (the master's copy after the fork)."""
        os.close(self._read)
        os.close(self._write)


@dataclass(frozen=True)
class ChildContext:
    """All that a child's main function is given.

    Attributes:
        settings: the configuration of this child's generation.
        arena: the shared memory; `slot` is this child's own record in it.
        worker_id: this process's name in PostgreSQL, `host:instance:wSLOT.SEQUENCE`.
        kind: migrator, worker, maintenance or web.
        pool: the worker's pool; None for a service.
        pool_index: place of the pool in the settings (for `arena.try_steal`); -1 for a service.
        web_socket: the bound, listening socket; for the web child only.
        stop: set once the child is to drain and end.
        state_dir: the instance's folder; `settles` and `metrics` are in it.
        host: this host's name.
        previous_instances: identities that ran in `state_dir` before; maintenance gives back what they held.
        max_jobs: jobs after which this worker is replaced, jitter included; 0 is never. The master counts too.
    """

    settings: Settings
    arena: Arena
    slot: Slot
    worker_id: str
    kind: Kind
    pool: PoolSettings | None
    pool_index: int
    web_socket: socket.socket | None
    stop: StopFlag
    state_dir: Path
    host: str
    previous_instances: tuple[UUID, ...]
    max_jobs: int = 0

    def report_ready(self) -> None:
        """This child can work: its application is imported, its loop is about to turn."""
        if self.slot.state == State.STARTING:
            self.slot.state = State.IDLE
        self.slot.progress()
        self.slot.ready = True
        self.arena.ring(self.arena.bell_master)


def run_loop(
    context: ChildContext,
    poll: Callable[[float], float],
    fds: Callable[[], Iterable[int]] | Iterable[int] = (),
) -> None:
    """Turn until the child is told to stop: one round, then wait as long as the round says.

    Args:
        context: the child's context; its bell (migrator, maintenance) and its stop flag wake the loop.
        poll: one round of work; is given time.monotonic(), returns the seconds until the next one at the latest.
        fds: file descriptors that wake the loop too, or a function that returns them (asked before each wait,
            because connections come and go).
    """
    bell = context.arena.bell_of(context.kind)
    stopped = context.stop.is_set()
    while not stopped:
        context.slot.progress()
        wait = poll(time.monotonic())
        more = fds() if callable(fds) else fds
        watched = [context.stop.fileno(), *([] if bell is None else [bell]), *more]
        ready = _wait_readable(watched, min(max(wait, 0.0), 1.0))
        if bell is not None and bell in ready:
            context.arena.answer(bell)
        stopped = context.stop.fileno() in ready and context.stop.is_set()


def _wait_readable(fds: list[int], seconds: float) -> set[int]:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return {fd for fd, _ in poller.poll(seconds * 1000)}


# first steps


@dataclass(frozen=True)
class Inheritance:
    """What a child needs for its first steps and was made by the master before the fork.

    Attributes:
        master_pid: who must be the parent.
        title: the process title.
        death_read: end of the pipe that ends when the master does.
        family_mark: beginning of all worker ids of this instance.
        keep: file descriptors beyond 0, 1, 2 that this child keeps; all others are closed.
        forget: closes what only the master may hold (objects that own a file descriptor close it themselves).
        mask: signals that were blocked before the master blocked all of them for the fork.
        fenced: jobs must not outlive the lease, and this child sees to it where the master does not.
    """

    master_pid: int
    title: str
    death_read: int
    family_mark: str
    keep: frozenset[int]
    forget: Callable[[], None]
    mask: set[signal.Signals]
    fenced: bool = False


def enter(kind: Kind, slot: Slot, arena: Arena, inherited: Inheritance) -> StopFlag:
    """A child's first steps, in the order that the top of this file explains. Signals are blocked until the last.

    Returns:
        The flag that SIGTERM sets in this process.
    """
    if kind == Kind.WORKER:
        # A worker may be stuck in C code where no thread of it runs. The others are our own code: they live a moment
        # longer, so that their watchers kill the workers' process groups.
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != inherited.master_pid:
        os._exit(0)  # the master died between the fork and the line above: no signal will come
    os.setpgid(0, 0)
    slot.pid = os.getpid()
    inherited.forget()
    _close_strays(inherited.keep)
    os.environ[MARK] = slot.worker_id
    _watch_master(arena, inherited)
    stop = StopFlag()
    _reset_signals(stop)
    setproctitle.setproctitle(inherited.title)
    random.seed()
    faulthandler.enable()  # SIGABRT to a hung child writes where each thread stands
    if kind == Kind.WORKER:
        _offer_to_oom_killer()
    signal.pthread_sigmask(signal.SIG_SETMASK, inherited.mask)
    return stop


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value})")


def become_subreaper() -> None:
    """Orphaned descendants of this process become its children, so that it can end and reap them."""
    pr_set_child_subreaper = 36
    _prctl(pr_set_child_subreaper, 1)


def _close_strays(keep: frozenset[int]) -> None:
    for fd in sorted(int(entry.name) for entry in Path("/proc/self/fd").iterdir()):
        if fd > 2 and fd not in keep:
            with contextlib.suppress(OSError):  # the one that listed the folder is gone already
                os.close(fd)


def _reset_signals(stop: StopFlag) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGUSR2, signal.SIGQUIT, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    for number in DEAF_SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN: programs that a job starts would inherit that
    signal.signal(
        signal.SIGTTOU, signal.SIG_IGN
    )  # else a log line to a terminal with `tostop` would stop the child
    stop.listen()


def _watch_master(arena: Arena, inherited: Inheritance) -> None:
    threading.Thread(target=_await_death, args=(arena, inherited), name="death-watch", daemon=True).start()


def _await_death(arena: Arena, inherited: Inheritance) -> None:
    """Wait for the end of the pipe: nobody writes, so it ends with the last copy of its write end, the master's.

    Workers and what they started go first: of all the watchers one at least gets through that before another kills it.
    """
    own = os.getpid()
    _wait_for_death(arena, inherited, own)
    others = [slot for slot in arena.slots if slot.live and slot.pid not in (0, own)]
    for slot in sorted(others, key=lambda slot: slot.kind != Kind.WORKER):
        if slot.kind != Kind.WORKER:
            kill_marked(inherited.family_mark)
        kill_group(slot.pid)
        kill_process(slot.pid)  # user code may have taken it out of its group
    kill_marked(inherited.family_mark)
    kill_group(own)


def _wait_for_death(arena: Arena, inherited: Inheritance, own: int) -> None:
    """Meanwhile, where jobs must not outlive the lease: kill what the master should have killed and did not."""
    poller = select.poll()
    poller.register(inherited.death_read, select.POLLIN)
    while inherited.fenced and not poller.poll(FENCE_LOOK_SECONDS * 1000):
        doomed = [slot for slot in arena.slots if fence.doomed(arena, slot, fence.WATCH_SECONDS)]
        # Its own process comes last: of several workers one at least gets through this.
        for slot in sorted(doomed, key=lambda slot: slot.pid == own):
            slot.isolated = True
            kill_marked(slot.worker_id + "\0")
            kill_group(slot.pid)
            kill_process(slot.pid)
    os.read(inherited.death_read, 1)


def kill_group(pgid: int) -> None:
    """SIGKILL to a whole process group, if it still exists."""
    if 1 < pgid <= MAX_PID:
        with contextlib.suppress(OSError):
            os.killpg(pgid, signal.SIGKILL)


def kill_process(pid: int) -> None:
    """SIGKILL to one process, if it still exists; never to all of them (-1), whatever stands in the arena."""
    if 1 < pid <= MAX_PID:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def kill_marked(worker_id: str) -> None:
    """SIGKILL to programs that were started by a worker and left its process group.

    A job's `Popen(start_new_session=True)` is out of reach of the group, and loses its parent with the worker. What it
    cannot lose is the environment that it was started with.

    Args:
        worker_id: of the worker, or the beginning of it that all workers of an instance share.
    """
    mark = f"\0{MARK}={worker_id}".encode()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                if mark in b"\0" + (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)


def _offer_to_oom_killer() -> None:
    """Short of memory, the kernel takes a worker rather than the master."""
    path = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        path.write_text(str(min(1000, int(path.read_text()) + WORKER_OOM_SCORE)))


def leave(code: int | None) -> None:
    """End this child with an exit code; what it logged goes out first."""
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(int(code or 0))
