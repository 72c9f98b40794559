"""The instance's folder: the lock that all its processes hold, its identity, metric files and saved settles.

The lock is taken once, by the master, and inherited by every child: the kernel gives it up when the last of them is
gone. So a master that gets it knows that nothing of the family before it lives, and may have rescued at once what that
family held.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from pmqd.errors import ConfigError

LOCK_PATIENCE = 3.0
LOCK_LOOK = 0.02
METRICS = "metrics"


@dataclass
class StateDir:
    """An open, locked state folder.

    Attributes:
        path: the folder.
        lock_fd: holds the lock; stays open in every child.
        previous: identity of the last instance that ran here; None on the first start.
    """

    path: Path
    lock_fd: int
    previous: UUID | None

    def write_instance(self, instance_id: UUID) -> None:
        """Keep the identity for the master after this one; whole or not at all."""
        fresh = self.path / "instance.new"
        fresh.write_text(f"{instance_id}\n")
        fresh.replace(self.path / "instance")

    def close(self) -> None:
        """Give the lock back (once no child lives)."""
        os.close(self.lock_fd)


def open_state_dir(path: Path, patience: float = LOCK_PATIENCE) -> StateDir:
    """Make the folder if it is missing, lock it, read who was here before, and begin with empty metrics.

    Args:
        path: `state_dir`.
        patience: seconds to wait for a family that is dying.

    Raises:
        ConfigError: the folder cannot be used, or another instance lives in it.
    """
    _make_private(path)
    lock_fd = _lock(path, patience)
    shutil.rmtree(
        path / METRICS, ignore_errors=True
    )  # values of processes that are gone; counters start over
    (path / METRICS).mkdir(mode=0o700)
    return StateDir(path, lock_fd, _read_instance(path))


def _make_private(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"state_dir {path}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"state_dir {path}: not a folder (a link is not followed)")
    if found.st_uid != os.geteuid():
        raise ConfigError(f"state_dir {path}: belongs to user {found.st_uid}, this is user {os.geteuid()}")
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise ConfigError(f"state_dir {path}: others may write in it; `chmod go-w` it")


def _lock(path: Path, patience: float) -> int:
    try:
        lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"state_dir {path}: cannot open its lock file: {error.strerror}") from error
    deadline = time.monotonic() + patience
    while not _try_lock(lock_fd):
        if time.monotonic() >= deadline:
            os.close(lock_fd)
            raise ConfigError(f"state_dir {path}: another pmqd runs with it; each instance needs its own")
        time.sleep(LOCK_LOOK)
    return lock_fd


def _try_lock(lock_fd: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _read_instance(path: Path) -> UUID | None:
    with contextlib.suppress(OSError, ValueError):
        return UUID((path / "instance").read_text().strip())
    return None
