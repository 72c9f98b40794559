"""What the run asks the machine: free ports, processes by session and by kind, facts for the report."""

import contextlib
import os
import platform
import random
import signal
import socket
from pathlib import Path

from pmqd.errors import PmqdError

_PORTS = range(
    15000, 32000
)  # below Linux's ephemeral ports (32768 on): no outgoing connection takes one meanwhile
_TRIES = 200
_TITLE = "pmqd: "


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, and that stays free while its server is down.

    Raises:
        PmqdError: there is none.
    """
    for port in random.Random(os.urandom(8)).sample(_PORTS, _TRIES):  # noqa: S311 - no secret
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise PmqdError(f"no free port of 127.0.0.1 from {_PORTS.start} to {_PORTS.stop - 1} in {_TRIES} tries")


def session_of(leader: int) -> list[int]:
    """The living processes of a session, also when its leader is gone; zombies are not living."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - a hundred names, asked for often
        if name.isdecimal():
            with contextlib.suppress(OSError):
                if os.getsid(int(name)) == leader and state_of(int(name)) not in "ZX":
                    found.append(int(name))
    return found


def state_of(pid: int) -> str:
    """The one letter of proc(5): R, S, D, T, Z …; X for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "X"


def children_of(pid: int) -> list[int]:
    """The children that the first thread of a process has started and not yet reaped."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return [] if not Path(f"/proc/{pid}").exists() else _children_by_search(pid)
    except OSError:
        return []


def _children_by_search(parent: int) -> list[int]:
    """The same where the kernel was built without that file."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208 - as above
        if name.isdecimal():
            with contextlib.suppress(OSError, IndexError, ValueError):
                stat = Path(f"/proc/{name}/stat").read_text(errors="replace")
                if int(stat.rpartition(")")[2].split()[1]) == parent:
                    found.append(int(name))
    return found


def kind_of(pid: int, master: int) -> str:
    """What a process of a host is: master, migrator, worker, maintenance, web; "starting" before it says so itself."""
    if pid == master:
        return "master"
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "gone"
    kind = title.removeprefix(_TITLE).split()[0] if title.startswith(_TITLE) else ""
    return kind if kind not in ("", "master") else "starting"


def send(pids: list[int], number: signal.Signals) -> None:
    """Signal processes; those that are gone are passed over."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def facts() -> dict[str, str | int]:
    """What the figures of a run depend on."""
    kilobytes = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        kilobytes = int(Path("/proc/meminfo").read_text().split("\n", 1)[0].split()[1])
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_mb": kilobytes // 1024,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
