"""Folders with short paths in the temporary one, that do not outlive their owners for ever."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "pmqd-tmp-"
_OWNER = "owner"


@contextlib.contextmanager
def short_folder(path: Path | None = None) -> Iterator[Path]:
    """A folder for sockets and private data (0700), removed at the end.

    A process that is killed cannot remove its folder: the next one to come here does it. A lock that the owner
    holds tells the living from the dead, also where containers share the temporary folder but not the process ids.

    Args:
        path: a folder that this function gave before, to be made once more.
    """
    _sweep()
    folder = path or Path(tempfile.mkdtemp(prefix=_PREFIX))
    if path is not None:
        path.mkdir(mode=0o700)  # fails if somebody took the name: then it is not ours
    owner = os.open(folder / "owner.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX)
        # Named only now that it is locked: no sweep can meet it before.
        (folder / "owner.new").rename(folder / _OWNER)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(owner)


def _sweep() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
            owner = os.open(folder / _OWNER, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(owner).st_uid == os.geteuid():
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(owner)
