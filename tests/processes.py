"""Which processes live."""

from collections.abc import Iterable

import psutil


def lives(pid: int) -> bool:
    """Whether a process exists and is no zombie: init may take seconds to reap one that lost its parent."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def zombies(processes: Iterable[psutil.Process]) -> list[int]:
    """Those that have ended and that nobody has reaped yet."""
    return [each.pid for each in processes if not lives(each.pid) and psutil.pid_exists(each.pid)]
