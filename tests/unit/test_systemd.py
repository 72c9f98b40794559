"""What goes to systemd, word by word."""

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pmqd.systemd import Notifier, datagram, watchdog_seconds


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[socket.socket]:
    """A notify socket on a path."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    made.bind(str(tmp_path / "n"))
    yield made
    made.close()


def test_a_value_is_one_line() -> None:
    """Line breaks in a status cannot forge another field."""
    assert datagram({"STATUS": "bad file:\nREADY=1"}) == b"STATUS=bad file: READY=1"


def test_messages(ear: socket.socket) -> None:
    """READY, RELOADING with its clock in one datagram, STOPPING with the time asked for, WATCHDOG."""
    environ = {"NOTIFY_SOCKET": ear.getsockname(), "OTHER": "1"}
    notifier = Notifier.from_environment(environ)
    assert environ == {"OTHER": "1"}
    before = time.monotonic_ns() // 1000
    notifier.ready()
    notifier.reloading()
    notifier.stopping(40)
    notifier.watchdog()
    assert ear.recv(999) == b"READY=1"
    reloading, clock = ear.recv(999).decode().splitlines()
    assert reloading == "RELOADING=1"
    assert before <= int(clock.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    assert ear.recv(999) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=40000000"
    assert ear.recv(999) == b"WATCHDOG=1"
    notifier.close()


def test_status_is_sent_when_it_changes(ear: socket.socket) -> None:
    """The loop says it each turn; systemd hears it once."""
    notifier = Notifier(ear.getsockname())
    for text in ("a", "a", "b"):
        notifier.status(text)
    assert (ear.recv(999), ear.recv(999)) == (b"STATUS=a", b"STATUS=b")
    with pytest.raises(BlockingIOError):
        ear.recv(999)
    notifier.close()


def test_abstract_names() -> None:
    """A leading @ stands for the NUL of an abstract socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as ear:
        ear.bind("")
        notifier = Notifier("@" + ear.getsockname()[1:].decode())
        notifier.ready()
        assert ear.recv(999) == b"READY=1"
        notifier.close()


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234", "/nowhere/at/all"])
def test_nobody_listens(address: str | None) -> None:
    """Without systemd, or where it cannot be reached, nothing happens."""
    notifier = Notifier(address)
    notifier.ready()
    notifier.close()


def test_watchdog() -> None:
    """The interval is told for this process only, a third of what is waited; nonsense means no watchdog."""
    assert watchdog_seconds({"WATCHDOG_USEC": "30000000"}, 1) == 30.0
    assert watchdog_seconds({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 7) == 30.0
    assert watchdog_seconds({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 8) is None
    assert watchdog_seconds({"WATCHDOG_USEC": "soon"}, 1) is None
    assert watchdog_seconds({"WATCHDOG_USEC": "0"}, 1) is None
    assert watchdog_seconds({}, 1) is None
    environ = {"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}
    assert Notifier.from_environment(environ).watchdog_interval == 1.0
    assert environ == {}
