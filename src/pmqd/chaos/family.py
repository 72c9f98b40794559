"""A host of the run: one master with its children, its configuration, its `state_dir` and its log, and how it is ended."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmqd.chaos.deaths import DeathWatch
from pmqd.chaos.machine import kind_of, send, session_of, state_of
from pmqd.chaos.servers import Keeper
from pmqd.errors import PmqdError
from pmqd.metrics import render
from pmqd.programs import dying_with_parent

LEFT_SECONDS = 1.0
"""Invariant 10: so long after its master nothing of a family lives."""

_PROPER_ENDS = (0, -signal.SIGKILL, -signal.SIGTERM)
"""Of masters that were killed or told to stop (perhaps before they could hear it); any other is the product's fault."""

_LEFT_LOOKS = 20  # at least: one look after a long pause of this machine proves nothing
_LOOK_SECONDS = 0.02
_GIVE_UP_SECONDS = 20.0
_HTTP_SECONDS = 5.0
_HEARING_SECONDS = 20.0


@dataclass(frozen=True)
class Surroundings:
    """What all hosts of a run share.

    Attributes:
        folder: of the run; crash points are armed by files in `points` there.
        mutant: the broken variant that all run, or None.
        keeper: starts their masters.
        deaths: watches their processes.
        complain: told what is wrong with how a host ended.
        points: the crash points of the product.
    """

    folder: Path
    mutant: str | None
    keeper: Keeper
    deaths: DeathWatch
    complain: Callable[[str], None]
    points: tuple[str, ...]


class Host:
    """One host. Any thread may call any method.

    Attributes:
        name: "a", "b", …
        config: the file that the master reads, at its start and at SIGHUP.
        state_dir: kept over restarts, so that a new master learns from its lock that the old family is gone.
        log_path: JSON records of all lives.
        lives: the metric files of the lives that were cut off.
    """

    def __init__(self, name: str, port: int, settings: Mapping[str, Any], around: Surroundings) -> None:
        self._home = around.folder / "hosts" / name
        self._home.mkdir(parents=True, mode=0o700)
        self._points = around.folder / "points"
        self._points.mkdir(exist_ok=True)
        self.name, self.port = name, port
        self.config, self.log_path = self._home / "pmqd.toml", self._home / "log"
        self.state_dir = self._home / "state"
        self.lives: list[Path] = []
        self._around = around
        self._environ = clean_environ() | {
            "PMQD_CHAOS_HISTORY": str(around.folder / "history"),
            "PMQD_CRASHPOINT": ",".join(f"{point}=kill@{self._point(point)}" for point in around.points),
        }
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._counted = True  # the metric files of the last life are in `lives`
        everything = {"state_dir": str(self.state_dir), **settings, "web": {"listen": f"127.0.0.1:{port}"}}
        self.config.write_text(to_toml(everything))

    # --- what is there

    @property
    def alive(self) -> bool:
        """Does its master live?"""
        return self._process is not None and self._process.poll() is None

    @property
    def master_pid(self) -> int:
        """Of the master that lives, or lived last; 0 before the first start."""
        return self._process.pid if self._process else 0

    def family(self) -> list[int]:
        """All living processes of the host, also when its master is gone."""
        return session_of(self.master_pid) if self.master_pid else []

    def pids(self, kind: str) -> list[int]:
        """The living processes of a kind: worker, migrator, maintenance, web, master."""
        return [pid for pid in self.family() if kind_of(pid, self.master_pid) == kind]

    def log_end(self) -> str:
        """What it said last, for people."""
        lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        return f"host {self.name} says: {lines[-1][:500]}" if lines else f"host {self.name} says nothing"

    def is_ready(self) -> bool:
        """Does /readyz say that it can work?"""
        try:
            return bool(self._get("/readyz"))
        except (OSError, urllib.error.URLError):
            return False

    def scrape(self) -> str:
        """The text of /metrics.

        Raises:
            OSError: the web child does not answer.
        """
        return self._get("/metrics")

    def _get(self, path: str) -> str:
        address = f"http://127.0.0.1:{self.port}{path}"
        with urllib.request.urlopen(address, timeout=_HTTP_SECONDS) as answer:
            return str(answer.read().decode())

    # --- life and death

    def start(self) -> None:
        """Start it unless it lives; what is left of its last life ends first, and is counted."""
        with self._lock:
            if self.alive:
                return
            self._see_the_end()
            self._process = self._around.keeper.run(self._spawn)
            self._counted = False
            self._around.deaths.master(self._process.pid, self.name)

    def kill(self) -> None:
        """SIGKILL to the master, and wait until nothing of the family lives."""
        with self._lock:
            if self._process is None:
                return
            self._process.kill()
            self._process.wait()
            self._see_the_end()

    def stop(self, timeout: float) -> int | None:
        """SIGTERM to the master; its exit code, or None if it had to be killed after `timeout` seconds."""
        with self._lock:
            if self._process is None:
                return None
            if self.alive:
                self._process.terminate()
            try:
                code = self._process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                return None
            self._see_the_end()
            return code

    def reload(self) -> None:
        """SIGHUP to the master, once it has read its configuration and can hear."""
        if self.hears():
            self._signal_master(signal.SIGHUP)

    def hears(self) -> bool:
        """Whether its master has read its configuration and takes signals; one that still starts is waited for."""
        deadline = time.monotonic() + _HEARING_SECONDS
        while self.alive and not _title(self.master_pid).startswith("pmqd:"):
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_SECONDS)
        return self.alive

    def pause(self) -> None:
        """SIGSTOP to all of it: a host that stands still and whose connections stay."""
        self._signal_master(signal.SIGSTOP)  # first: it starts nobody meanwhile
        send(self.family(), signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT to all of it that stands still."""
        stopped = [pid for pid in self.family() if state_of(pid) == "T"]
        send(sorted(stopped, key=lambda pid: pid == self.master_pid), signal.SIGCONT)

    def arm(self, point: str) -> None:
        """The next process of this host that passes there dies."""
        self._point(point).touch()

    def disarm(self, point: str) -> None:
        """Nobody dies there."""
        self._point(point).unlink(missing_ok=True)

    def armed(self, point: str) -> bool:
        """Is it armed, and nobody has passed?"""
        return self._point(point).exists()

    def _point(self, point: str) -> Path:
        return self._points / f"{self.name}.{point}"

    def last_metrics(self) -> list[str]:
        """The pages of the lives that were cut off, from their files."""
        return [render(life).decode() for life in self.lives]

    def _signal_master(self, number: signal.Signals) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(number)

    def _spawn(self) -> "subprocess.Popen[bytes]":
        more = ["--mutant", self._around.mutant] if self._around.mutant else []
        with self.log_path.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - this program, started again
                [sys.executable, "-m", "pmqd.chaos.host", "--config", str(self.config), *more],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,
                preexec_fn=dying_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one prepared call, no lock taken
            )

    def _see_the_end(self) -> None:
        """Wait until the family of a dead master is gone, complain if it takes too long, and keep its counters."""
        if self._counted or self._process is None:
            return
        if self._process.returncode not in _PROPER_ENDS:
            self._around.complain(
                f"host {self.name} ended by itself: {ending(self._process.returncode)}; {self.log_end()}"
            )
        self.resume()  # what stands still cannot see that its master is gone
        began, looks = time.monotonic(), 0
        while left := self.family():
            age, looks = time.monotonic() - began, looks + 1
            if age > LEFT_SECONDS and looks >= _LEFT_LOOKS:
                self._end_the_rest(left, age)
                break
            time.sleep(_LOOK_SECONDS)
        self._counted = True
        metrics = self.state_dir / "metrics"
        if metrics.is_dir():
            # Moved: a life that ends before it has made its own must not be credited with these again.
            self.lives.append(metrics.rename(self._home / f"life-{len(self.lives) + 1}"))

    def _end_the_rest(self, left: list[int], age: float) -> None:
        kinds = ", ".join(f"{kind_of(pid, self.master_pid)} {pid} ({state_of(pid)})" for pid in left)
        self._around.complain(f"host {self.name}: {age:.1f} s after its master these live: {kinds}")
        deadline = time.monotonic() + _GIVE_UP_SECONDS
        while left:
            send(left, signal.SIGKILL)
            time.sleep(_LOOK_SECONDS)
            left = self.family()
            if left and time.monotonic() > deadline:
                raise PmqdError(f"host {self.name}: the processes {left} do not die of SIGKILL")


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def ending(code: int) -> str:
    """How a process ended, in words."""
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def clean_environ() -> dict[str, str]:
    """This process's environment without settings of pmqd and of libpq, which would lead a host elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PMQD_", "PG"))}


def to_toml(settings: Mapping[str, Any]) -> str:
    """A configuration as TOML: JSON's strings, numbers, booleans and lists are TOML's too."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items() if _is_plain(value)]
    for name, value in settings.items():
        if isinstance(value, list) and not _is_plain(value):
            for table in value:
                lines += [f"[[{name}]]", *_pairs(table)]
        elif isinstance(value, Mapping):
            lines += _tables(name, value)
    return "\n".join(lines) + "\n"


def _tables(name: str, table: Mapping[str, Any]) -> list[str]:
    if any(isinstance(value, Mapping) for value in table.values()):
        return [line for key, inner in table.items() for line in (f'[{name}."{key}"]', *_pairs(inner))]
    return [f"[{name}]", *_pairs(table)]


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {json.dumps(value)}" for name, value in table.items()]


def _is_plain(value: Any) -> bool:
    return not isinstance(value, Mapping) and not (
        isinstance(value, list) and any(isinstance(each, Mapping) for each in value)
    )
