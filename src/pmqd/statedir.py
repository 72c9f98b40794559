"""The instance's folder: the lock that all its processes hold, its identity, metric files and saved settles.

The lock is taken once, by the master, and inherited by every child: the kernel gives it up when the last of them is
gone. So a master that gets it knows that nothing of the family before it lives, and may have rescued at once what that
family held.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from pmqd.errors import ConfigError
from pmqd.kernel import birth, holders

log = logging.getLogger(__name__)
LOCK_PATIENCE = 3.0
LOCK_LOOK = 0.02
METRICS = "metrics"
INSTANCES = "instances"


@dataclass
class StateDir:
    """An open, locked state folder.

    Attributes:
        path: the folder.
        lock_fd: holds the lock; stays open in every child.
        previous: identities that ran here and may still hold jobs: a family can end before it has given back what the
            one before it held.
    """

    path: Path
    lock_fd: int
    previous: tuple[UUID, ...]

    def write_instance(self, instance_id: UUID) -> None:
        """Keep an identity for the masters after this one, until what it held is given back."""
        (self.path / INSTANCES / str(instance_id)).touch(mode=0o600)

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
    # Values of processes that are gone; counters start over.
    shutil.rmtree(path / METRICS, ignore_errors=True)
    try:
        (path / METRICS).mkdir(mode=0o700)
        (path / INSTANCES).mkdir(mode=0o700, exist_ok=True)
        return StateDir(path, lock_fd, tuple(_instances(path / INSTANCES)))
    except OSError as error:
        os.close(lock_fd)
        raise ConfigError(f"state_dir {path}: {error.filename} is in the way: {error.strerror}") from error


def forget_instance(path: Path, instance_id: UUID) -> None:
    """An identity holds nothing any more.

    Args:
        path: `state_dir`.
        instance_id: one of `previous`.
    """
    with contextlib.suppress(OSError):  # then it is given back once more, which finds nothing
        (path / INSTANCES / str(instance_id)).unlink(missing_ok=True)


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
    for parent in path.resolve().parents:
        if parent.stat().st_mode & 0o1002 == 0o002:
            raise ConfigError(
                f"state_dir {path}: every user may replace it, as {parent} may be written by all; `chmod +t` that"
            )


def _lock(path: Path, patience: float) -> int:
    try:
        lock_fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise ConfigError(f"state_dir {path}: cannot open its lock file: {error.strerror}") from error
    if not _await_lock(lock_fd, patience) and not (
        _end_orphans(path, lock_fd) and _await_lock(lock_fd, patience)
    ):
        os.close(lock_fd)
        raise ConfigError(f"state_dir {path}: another pmqd runs with it; each instance needs its own")
    os.pwrite(lock_fd, f"{os.getpid():10} {birth(os.getpid()):20}\n".encode(), 0)
    return lock_fd


def _await_lock(lock_fd: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while not _try_lock(lock_fd):
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOCK_LOOK)
    return True


def _end_orphans(path: Path, lock_fd: int) -> bool:
    """Ends what is left of a family whose master is dead; False where the master that wrote the lock lives, or nobody knows.

    Its children end by themselves, unless they are kept from it: stopped, frozen, or stuck in the kernel.
    """
    try:
        pid, born = map(int, os.pread(lock_fd, 64, 0).split())
    except ValueError:
        return False
    if birth(pid) == born:
        return False
    left = holders(path / "lock")
    for each in left:
        log.warning("state_dir %s: process %d is left of a family without a master; killed", path, each)
        with contextlib.suppress(OSError):
            os.kill(each, signal.SIGKILL)
    return bool(left)


def _try_lock(lock_fd: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _instances(folder: Path) -> Iterator[UUID]:
    for entry in sorted(folder.iterdir()):
        with contextlib.suppress(ValueError):  # somebody else's file
            yield UUID(entry.name)


def read_own(path: Path) -> bytes:
    """The content of a file in the folder, if it is a plain file of this user.

    Jobs run as the same user and may put anything there: a link to somewhere else, or a pipe on which a read would wait
    for ever.

    Raises:
        OSError: it is something else, or cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:  # noqa: PTH123 - by its descriptor, so that it stays the file that was looked at
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "not a plain file of this user", str(path))
        return file.read()
