"""The worker processes of one contestant: started, watched, killed, ended."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from benchmarks.peers.arena import HERE, Arena, Failure
from pmqd.chaos.machine import session_of
from pmqd.programs import dying_with_parent
from tests.fix_daemon import Daemon, free_port

BOOT_SECONDS = 5.0
"""What a peer's workers get until they are taken for idle; the slowest needs two."""


class Workers:
    """What all of them can."""

    def start(self) -> None:
        """Starts all of them."""
        raise NotImplementedError

    def wait_idle(self) -> None:
        """Waits until they have booted and have nothing to do."""
        raise NotImplementedError

    def check(self) -> None:
        """Makes sure that they live.

        Raises:
            Failure: one has ended; with the end of its log.
        """
        raise NotImplementedError

    def pids(self) -> list[int]:
        """All processes, supervisors too."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL to all of them at once."""
        raise NotImplementedError

    def stop(self) -> None:
        """Ends what is left after the measurement."""
        self.kill()


class Programs(Workers):
    """Workers that are plain programs, each in a session of its own."""

    def __init__(self, commands: Sequence[Sequence[str]], environ: dict[str, str], arena: Arena) -> None:
        self.commands, self.environ = commands, environ
        self.log = arena.folder / "workers.log"
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """One process per command."""
        with self.log.open("ab") as log:
            self.processes = [
                subprocess.Popen(
                    command,
                    cwd=HERE,
                    env=self.environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=dying_with_parent(signal.SIGKILL),  # noqa: PLW1509 - one prepared call
                )
                for command in self.commands
            ]

    def wait_idle(self) -> None:
        """A fixed time: nobody is told by all of them when they are ready."""
        time.sleep(BOOT_SECONDS)
        self.check()

    def check(self) -> None:
        """None may have ended."""
        for process in self.processes:
            if process.poll() is not None:
                log = self.log.read_text(errors="replace")[-2000:]
                raise Failure(f"worker ended with {process.returncode}: {process.args!r}\n{log}")

    def pids(self) -> list[int]:
        """The whole session of each: a supervisor's children too."""
        return [member for process in self.processes for member in session_of(process.pid)]

    def kill(self) -> None:
        """The whole session of each."""
        for member in self.pids():
            os.kill(member, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        self.processes = []


class PmqdWorkers(Workers):
    """A daemon with one pool of 2 processes, all else by default.

    Args:
        arena: where.
        settings: tables over the usual ones; those of `workers` go into the pool.
        whole: the kill takes the master and everything, else the workers, which the master replaces.
    """

    def __init__(
        self, arena: Arena, settings: Mapping[str, Mapping[str, Any]] | None = None, *, whole: bool = False
    ) -> None:
        self.arena, self.whole = arena, whole
        given = dict(settings or {})
        shape = {"concurrency": 50} if arena.sleep else {}
        pool = {"app": "benchmarks.peers.pmqd_jobs:app", "processes": 2, **shape, **given.pop("workers", {})}
        self.settings: dict[str, Any] = {
            "state_dir": str(arena.folder / "state"),
            "postgres": {"dsn": arena.dsn},
            "redis": {"url": arena.redis.url, **given.pop("redis", {})},
            "web": {"listen": f"127.0.0.1:{free_port()}"},
            "log": {"format": "json"},
            "workers": [pool],
            **given,
        }
        self.daemon: Daemon | None = None

    def start(self) -> None:
        """A daemon, unless one lives."""
        if self.daemon is None or self.daemon.process.poll() is not None:
            self.daemon = Daemon(self.arena.folder, self.settings, self.arena.environ)

    def wait_idle(self) -> None:
        """Ready by its own word, and then as long as the others get."""
        assert self.daemon is not None, "started"
        try:
            self.daemon.wait_ready(60)
        except pytest.fail.Exception as error:
            raise Failure(str(error)) from None
        time.sleep(BOOT_SECONDS)

    def check(self) -> None:
        """The master lives."""
        assert self.daemon is not None, "started"
        if self.daemon.process.poll() is not None:
            raise Failure(
                f"the daemon ended with {self.daemon.process.returncode}\n{self.daemon.log[-2000:]}"
            )

    def pids(self) -> list[int]:
        """The whole family."""
        assert self.daemon is not None, "started"
        return session_of(self.daemon.pid)

    def kill(self) -> None:
        """SIGKILL to all workers, or to the whole family."""
        assert self.daemon is not None, "started"
        victims = self.daemon.family() if self.whole else self.daemon.children("worker")
        for process in victims:
            process.kill()
        if self.whole:
            self.daemon.process.wait()

    def stop(self) -> None:
        """SIGTERM; SIGKILL to all when that takes too long, which is no reason to throw the measurement away."""
        if self.daemon is not None:
            try:
                self.daemon.stop()
            except pytest.fail.Exception as error:
                print(f"the daemon had to be killed: {error}", flush=True)
