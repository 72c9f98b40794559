"""What systemd is told, and how (sd_notify(3)): one datagram of NAME=value lines to the socket in NOTIFY_SOCKET.

Nothing here can fail the daemon: a datagram that cannot be sent is dropped. The variables are taken out of the
environment, so that no child of ours speaks for the service.
"""

import contextlib
import os
import socket
import time
from collections.abc import Mapping, MutableMapping


class Notifier:
    """The service manager's ear; without an address every message goes nowhere."""

    def __init__(self, address: str | None = None, watchdog_seconds: float | None = None) -> None:
        self._address = _socket_address(address) if address else None
        self._socket = self._connect()
        self._status = ""
        self.watchdog_interval = watchdog_seconds / 3 if watchdog_seconds else None
        """Seconds between two WATCHDOG=1, a third of what systemd waits; None where it does not watch."""

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] = os.environ) -> "Notifier":
        """The notifier that the environment asks for; its variables are removed from there."""
        address = environ.pop("NOTIFY_SOCKET", None)
        return cls(address, watchdog_seconds(environ, os.getpid()))

    def _connect(self) -> socket.socket | None:
        if self._address is None:
            return None
        return socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def ready(self) -> None:
        """The service is up, or its reload is over."""
        self._send({"READY": "1"})

    def reloading(self) -> None:
        """A reload begins: both lines in one datagram, or systemd 253 and later wait for the missing one."""
        self._send(
            {"RELOADING": "1", "MONOTONIC_USEC": str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)}
        )

    def stopping(self, extend_seconds: float) -> None:
        """The service begins to stop, and asks for so much time for it (the unit's own limit holds where it is longer)."""
        self._send({"STOPPING": "1", "EXTEND_TIMEOUT_USEC": str(int(extend_seconds * 1e6))})

    def watchdog(self) -> None:
        """The loop turns."""
        self._send({"WATCHDOG": "1"})

    def status(self, text: str) -> None:
        """A sentence for `systemctl status`; sent when it changed."""
        if text != self._status:
            self._status = text
            self._send({"STATUS": text})

    def _send(self, fields: Mapping[str, str]) -> None:
        if self._socket is not None and self._address is not None:
            with contextlib.suppress(OSError):
                self._socket.sendto(datagram(fields), self._address)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()


def datagram(fields: Mapping[str, str]) -> bytes:
    """NAME=value lines; a value is one line whatever it holds."""
    return "\n".join(f"{name}={' '.join(value.split())}" for name, value in fields.items()).encode()


def watchdog_seconds(environ: MutableMapping[str, str], pid: int) -> float | None:
    """How long systemd waits for a WATCHDOG=1, taken out of the environment; None: it does not watch this process."""
    usec, watched = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0 or (watched and watched != str(pid)):
        return None
    return int(usec) / 1e6


def _socket_address(address: str) -> str | None:
    """A path, or an abstract name (`@…` stands for a leading NUL); anything else (vsock) is not spoken here."""
    if address.startswith("@"):
        return "\0" + address[1:]
    return address if address.startswith("/") else None
