"""Notes every process of the hosts that ended, and when: `history/deaths`, one line each.

The checker closes with it what a killed process left open, so a time may be a little late but never early: it is taken
after the kernel has said that the process is dead.
"""

import contextlib
import os
import select
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from pmqd.chaos.machine import children_of, kind_of, state_of

LOOK_SECONDS = 0.02


@dataclass
class _Watched:
    pid: int
    master: int
    host: str
    kind: str
    fd: int | None  # None where this kernel has no pidfd_open, or does not allow it

    def is_dead(self) -> bool:
        return state_of(self.pid) in "ZX"


class DeathWatch:
    """A thread that looks for new children of the hosts' masters, and is told by the kernel of each one's end."""

    def __init__(self, path: Path) -> None:
        self._out = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._lock = threading.Lock()
        self._watched: dict[int, _Watched] = {}
        self._noted: set[int] = set()  # dead, but still listed until their master reaps them
        self._poll = select.poll()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="death-watch", daemon=True)
        self._thread.start()

    def master(self, pid: int, host: str) -> None:
        """Watch a master that was just started, and from now on its children."""
        with self._lock:
            self._add(pid, pid, host)

    @property
    def watched(self) -> int:
        """How many processes live, as far as it knows."""
        return len(self._watched)

    def close(self) -> None:
        """Look once more, and end."""
        self._stop.set()
        self._thread.join()
        self._look(0)
        for seen in self._watched.values():
            if seen.fd is not None:
                os.close(seen.fd)
        os.close(self._out)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look(LOOK_SECONDS)

    def _look(self, patience: float) -> None:
        with self._lock:
            self._find_children()
        ready = self._poll.poll(patience * 1000) if self._watched else []
        if not self._watched:
            self._stop.wait(patience)
        with self._lock:
            found = {fd for fd, _ in ready}
            for seen in list(self._watched.values()):
                if seen.fd in found or (seen.fd is None and seen.is_dead()):
                    self._note(seen)

    def _find_children(self) -> None:
        listed = set()
        for seen in [each for each in self._watched.values() if each.pid == each.master]:
            for pid in children_of(seen.pid):
                listed.add(pid)
                if pid not in self._watched and pid not in self._noted:
                    self._add(pid, seen.pid, seen.host)
        self._noted &= listed
        for seen in self._watched.values():
            if seen.kind == "starting":
                seen.kind = kind_of(seen.pid, seen.master)

    def _add(self, pid: int, master: int, host: str) -> None:
        fd = None
        try:
            fd = os.pidfd_open(pid)
            self._poll.register(fd, select.POLLIN)
        except ProcessLookupError:
            return  # dead and reaped since it was listed: it was watched, or never ran a job
        except OSError:
            fd = None
        self._watched[pid] = _Watched(pid, master, host, kind_of(pid, master), fd)

    def _note(self, seen: _Watched) -> None:
        line = f"D {seen.pid} {time.monotonic_ns()} {seen.host} {seen.kind}\n"
        os.write(self._out, line.encode())
        del self._watched[seen.pid]
        self._noted.add(seen.pid)
        if seen.fd is not None:
            self._poll.unregister(seen.fd)
            with contextlib.suppress(OSError):
                os.close(seen.fd)
