"""What the workers of an instance serve, told to its maintenance: one small file per pool in `state_dir/served`.

Only workers import applications. A pool without a list of queues serves what its application handles, and the kinds are
known there alone; maintenance writes both to the instance's row, so that the migrator knows for whom to mark.
"""

import contextlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import orjson

from pmqd.statedir import read_own

FOLDER = "served"
SURE_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Served:
    """What a pool's application handles: queues, most important first, and kinds of jobs."""

    queues: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()


def tell(state_dir: Path, pool: str, queues: Iterable[str], kinds: Iterable[str]) -> None:
    """Says what a pool's application handles; by a worker, once it has imported it and before it is ready.

    Args:
        state_dir: the instance's folder.
        pool: the pool's name.
        queues: all that the application handles, in its order.
        kinds: the names of its tasks.

    Raises:
        OSError: the disk refused.
    """
    folder = state_dir / FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = orjson.dumps({"queues": list(queues), "kinds": sorted(kinds)})
    path = folder / f"{pool}.json"
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == text:
            return
    # Several workers of a pool may tell at once: each writes its own file, the rename is whole.
    part = folder / f"{pool}.{os.getpid()}.part"
    part.write_bytes(text)
    part.rename(path)


class Reader:
    """What has been told, read anew where something has been since the last time."""

    def __init__(self, state_dir: Path) -> None:
        """Takes the instance's folder."""
        self._state_dir = state_dir
        self._found: dict[str, Served] = {}
        self._seen = 0

    def read(self) -> dict[str, Served]:
        """As `read`."""
        changed = self._changed()
        if changed != self._seen or not changed:
            self._found = read(self._state_dir)
            # What is renamed into a folder twice within a tick of the kernel's clock leaves the same time there.
            self._seen = changed if time.time_ns() - changed > SURE_NS else 0
        return self._found

    def _changed(self) -> int:
        """When a file was last put there (wall clock, ns); 0 for never."""
        with contextlib.suppress(OSError):
            return (self._state_dir / FOLDER).stat().st_mtime_ns
        return 0


def read(state_dir: Path) -> dict[str, Served]:
    """What has been told, by pool. A file that cannot be read counts as not told."""
    found = {}
    for path in (state_dir / FOLDER).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            said = orjson.loads(read_own(path))
            queues, kinds = tuple(said["queues"]), tuple(said["kinds"])
            if all(isinstance(name, str) for name in (*queues, *kinds)):
                found[path.stem] = Served(queues, kinds)
    return found
