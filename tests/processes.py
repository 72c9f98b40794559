"""Which processes live."""

import psutil


def lives(pid: int) -> bool:
    """Whether a process exists and is no zombie: init may take seconds to reap one that lost its parent."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
