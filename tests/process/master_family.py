"""A master over stub children as a program of its own, with what a test needs to steer and to watch it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.fix_servers import wait_until
from tests.processes import lives

__all__ = ["Family", "StartFamily", "gone", "start_family", "wait_until"]
STUBS = Path(__file__).parent / "master_stubs.py"
Event = dict[str, Any]


def gone(pids: list[int]) -> bool:
    """No process of these lives; one that waits to be reaped is gone."""
    return not any(lives(pid) for pid in pids)


class Family:
    """One master and its children."""

    def __init__(self, directory: Path, state_dir: Path | None) -> None:
        self.dir = directory
        self.state_dir = state_dir or directory / "state"
        self.config = directory / "pmqd.toml"
        self.process: subprocess.Popen[bytes]
        self.port = free_port()

    def write(self, mode: str, *, processes: int = 1, pools: str = "", top: str = "", pool: str = "") -> None:
        """Write the configuration that the next start or reload reads."""
        self.config.write_text(f"""
state_dir = "{self.state_dir}"
{top}
[web]
listen = "127.0.0.1:{self.port}"
[[workers]]
name = "stub"
app = "stub:{mode}"
processes = {processes}
{pool}
{pools}
""")

    def start(self, environ: dict[str, str], pass_fds: tuple[int, ...] = ()) -> None:
        """Run the master."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PMQD_")}
        with (self.dir / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(STUBS), str(self.config)],
                stderr=log,
                stdout=log,
                pass_fds=pass_fds,
                env={
                    **clean,
                    "STUB_DIR": str(self.dir),
                    "PMQD_LOG__FORMAT": "json",
                    **environ,
                },
            )

    @property
    def log(self) -> str:
        """What the family has logged so far."""
        return (self.dir / "log").read_text()

    def events(self, event: str | None = None, **match: object) -> list[Event]:
        """What the stubs told, in order."""
        file = self.dir / "events.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        told = [json.loads(line) for line in lines]
        return [
            one
            for one in told
            if (event is None or one["event"] == event) and all(one[k] == v for k, v in match.items())
        ]

    def last(self, event: str, **match: object) -> Event:
        """The last such event; empty where there was none."""
        found = self.events(event, **match)
        return found[-1] if found else {}

    def order(self, name: str) -> None:
        """Make the stubs behave so."""
        (self.dir / name).touch()

    def revoke(self, name: str) -> None:
        """Take the order back."""
        (self.dir / name).unlink()

    def signal(self, number: signal.Signals) -> None:
        """Signal the master."""
        self.process.send_signal(number)

    def wait_ready(self, workers: int = 1) -> None:
        """Wait for the master's own word that all kinds work, and for so many workers."""
        self.wait_log("starting -> running")
        wait_until(
            lambda: len(self.events("ready", kind="worker")) >= workers, 10, f"{workers} workers ready"
        )

    def wait_log(self, text: str, times: int = 1, timeout: float = 10) -> None:
        """Wait for a log line."""
        try:
            wait_until(lambda: self.log.count(text) >= times, timeout, f"{text!r} in the log")
        except BaseException:
            sys.stderr.write(self.log)
            raise

    def stop(self) -> int:
        """SIGTERM, then the exit code."""
        self.signal(signal.SIGTERM)
        return self.process.wait(20)

    def end(self) -> None:
        """Leave nothing, and fail if something was left."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(5)
        pids = [event["pid"] for event in self.events()]
        pids += [pid for event in self.events("ready", kind="worker") for pid in event.get("offspring", [])]
        wait_until(lambda: gone(pids), 2.0, "no process left")


class StartFamily(Protocol):
    """Start a family; see the fixture."""

    def __call__(
        self,
        mode: str,
        *,
        processes: int = 1,
        job: str = "",
        state_dir: Path | None = None,
        environ: Callable[[Family], dict[str, str]] | None = None,
        pass_fds: tuple[int, ...] = (),
        **settings: float,
    ) -> Family:
        """Start."""


@pytest.fixture
def start_family(tmp_path: Path) -> Iterator[StartFamily]:
    """A function that starts a master whose workers are stubs of the given mode; all is ended after the test."""
    families: list[Family] = []

    def start(
        mode: str,
        *,
        processes: int = 1,
        job: str = "",
        state_dir: Path | None = None,
        environ: Callable[[Family], dict[str, str]] | None = None,
        pass_fds: tuple[int, ...] = (),
        **settings: float,
    ) -> Family:
        directory = tmp_path / f"family-{len(families)}"
        directory.mkdir()
        family = Family(directory, state_dir)
        pool = "".join(f"{k} = {settings.pop(k)}\n" for k in list(settings) if k.startswith("max_"))
        family.write(
            mode, processes=processes, pool=pool, top="".join(f"{k} = {v}\n" for k, v in settings.items())
        )
        if job:
            (directory / "job").write_text(job)
        family.start(environ(family) if environ else {}, pass_fds)
        families.append(family)
        return family

    yield start
    for family in families:
        family.end()


def free_port() -> int:
    """A port of the loopback address that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
