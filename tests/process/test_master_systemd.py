"""What systemd hears from a real master: a recorder stands in for it on NOTIFY_SOCKET."""

import configparser
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmqd import config
from tests.process import master_family
from tests.process.master_family import StartFamily, wait_until

pytestmark = pytest.mark.timeout(60)
start_family = master_family.start_family  # the fixture


class Recorder:
    """A notify socket that keeps every datagram."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind("")  # the kernel chooses an abstract name
        self.address = "@" + self.socket.getsockname()[1:].decode()
        self.datagrams: list[str] = []

    def heard(self) -> list[str]:
        """All datagrams so far, in order."""
        while True:
            try:
                self.datagrams.append(self.socket.recv(65536).decode())
            except BlockingIOError:
                return self.datagrams

    def wait_for(self, line: str, times: int = 1) -> None:
        """Wait for a line, the n-th time."""
        wait_until(lambda: sum(line in datagram.splitlines() for datagram in self.heard()) >= times, 10, line)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """A recorder on an abstract socket."""
    made = Recorder()
    yield made
    made.socket.close()


def test_ready_reload_and_stop_are_told(start_family: StartFamily, recorder: Recorder) -> None:
    """READY only once every kind works, RELOADING with its clock in one datagram, READY again, STOPPING at the end."""
    family = start_family("slow_boot", boot_seconds=1, environ=lambda _: {"NOTIFY_SOCKET": recorder.address})
    wait_until(lambda: family.events("ready", kind="web"), 15, "the web child")
    assert not any("READY=1" in datagram for datagram in recorder.heard())
    recorder.wait_for("READY=1")
    assert family.events("ready", kind="worker")
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    family.signal(signal.SIGHUP)
    recorder.wait_for("RELOADING=1")
    fields = next(d for d in recorder.heard() if "RELOADING=1" in d).splitlines()
    told = int(next(field for field in fields if field.startswith("MONOTONIC_USEC=")).partition("=")[2])
    assert before <= told <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    recorder.wait_for("READY=1", 2)
    assert family.stop() == 0
    recorder.wait_for("STOPPING=1")
    assert any("STATUS=draining" in datagram for datagram in recorder.heard())


def test_a_failed_reload_is_told_in_words(start_family: StartFamily, recorder: Recorder) -> None:
    """STATUS says what was wrong with the file; systemd hears READY again, because the service works."""
    family = start_family("normal", environ=lambda _: {"NOTIFY_SOCKET": recorder.address})
    recorder.wait_for("READY=1")
    family.write("normal", top="nonsense = 1")
    family.signal(signal.SIGHUP)
    recorder.wait_for("READY=1", 2)
    wait_until(
        lambda: any("STATUS=reload refused" in d and "nonsense" in d for d in recorder.heard()), 15, "STATUS"
    )


def test_the_watchdog_hears_the_loop(start_family: StartFamily, recorder: Recorder) -> None:
    """WATCHDOG=1 comes three times per WATCHDOG_USEC, and not from a master that stands still."""
    environ = {"NOTIFY_SOCKET": recorder.address, "WATCHDOG_USEC": "600000"}
    family = start_family("normal", environ=lambda _: environ)
    recorder.wait_for("WATCHDOG=1", 5)
    family.signal(signal.SIGSTOP)
    wait_until(lambda: "T" in _state(family.process.pid), 15, "the stop")
    count = recorder.heard().count("WATCHDOG=1")
    deadline = time.monotonic() + 0.6
    wait_until(lambda: time.monotonic() > deadline, 15, "the time of three beats")
    assert recorder.heard().count("WATCHDOG=1") == count
    family.signal(signal.SIGCONT)
    recorder.wait_for("WATCHDOG=1", count + 1)


def test_children_do_not_speak_for_the_service(start_family: StartFamily, recorder: Recorder) -> None:
    """NOTIFY_SOCKET and WATCHDOG_USEC are not in any child's environment as a program started there would get it."""
    environ = {"NOTIFY_SOCKET": recorder.address, "WATCHDOG_USEC": "30000000"}
    family = start_family("environment", environ=lambda _: environ)
    family.wait_ready()
    seen = family.last("ready", kind="worker")["environ"]
    assert "NOTIFY_SOCKET" not in seen
    assert "WATCHDOG_USEC" not in seen
    assert "_PMQD_WORKER" in seen


def test_the_unit_fits_the_defaults() -> None:
    """The unit waits longer for a stop than a drain takes, does not restart on 78 and 79, and hears the main process."""
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(Path(__file__).parents[2] / "systemd" / "pmqd.service")
    service = unit["Service"]
    defaults = config.Settings()
    assert service["Type"] == "notify"
    assert service["NotifyAccess"] == "main"
    assert service["KillMode"] == "mixed"
    assert service["OOMPolicy"] == "continue"
    assert service["RestartPreventExitStatus"].split() == ["78", "79"]
    assert int(service["TimeoutStopSec"]) > defaults.drain_seconds + 20
    assert int(service["TimeoutStartSec"]) > defaults.boot_seconds
    assert int(service["WatchdogSec"]) >= 10
    assert service["RuntimeDirectoryMode"] == "0700"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
