"""Where a measurement takes place: private servers with default durability, an empty database, and the file of slots."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.peers import slots
from benchmarks.peers.tools import ROOT, TOOLS
from pmqd.embedded import PostgresServer, RedisServer
from tests.fix_daemon import clean_environ

HERE = Path(__file__).parent
TEXT_BYTES = 115
"""Of the text in a payload, which makes about 150 bytes of JSON."""
_REMOVE_SECONDS = 5.0
_SHARED_MEMORY = Path("/dev/shm")


class Failure(Exception):  # noqa: N818 - what went wrong is a measurement, not this program
    """A contestant could not be measured; says which, and what was seen."""


@dataclass
class Arena:
    """The servers and slots of one measurement.

    Attributes:
        folder: for everything but the slots.
        jobs: how many slots there are.
        sleep: seconds that each job sleeps; 0: jobs that do nothing, for which workers are set up otherwise.
        step: seconds from one enqueue to the next where they are paced.
        settings: PostgreSQL settings over the usual ones.
    """

    folder: Path
    jobs: int
    sleep: float = 0.0
    step: float = 0.02
    settings: Mapping[str, str] = field(default_factory=dict)
    postgres: PostgresServer = field(init=False)
    redis: RedisServer = field(init=False)
    slots: Path = field(init=False)
    dsn: str = ""

    def __post_init__(self) -> None:
        usual = {
            "fsync": "on",
            "full_page_writes": "on",
            "shared_buffers": "512MB",
            "max_wal_size": "4GB",
            "max_connections": "200",
        }
        self.postgres = PostgresServer(self.folder / "pg", settings=usual | dict(self.settings))
        self.redis = RedisServer(self.folder / "redis", tcp=True)

    def start(self) -> None:
        """Servers, an empty database, empty slots: in memory, so that a job pays for no disk."""
        self.postgres.start()
        self.redis.start()
        self.dsn = self.postgres.create_database("bench")
        memory = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else self.folder
        number, name = tempfile.mkstemp(prefix="pmqd-bench-", dir=memory)
        self.slots = Path(name)
        os.truncate(number, 8 * slots.REGIONS * self.jobs)
        os.close(number)

    def stop(self) -> None:
        """Ends the servers."""
        self.redis.stop()
        self.postgres.stop()
        if hasattr(self, "slots"):
            self.slots.unlink(missing_ok=True)

    def connect(self) -> psycopg.Connection[Any]:
        """An autocommit connection."""
        return psycopg.connect(self.dsn, autocommit=True)

    def settled(self) -> None:
        """What was filled in is analysed and on the disk."""
        with self.connect() as connection:
            connection.execute("vacuum analyze")
            connection.execute("checkpoint")

    @property
    def environ(self) -> dict[str, str]:
        """What the peers' programs are told."""
        return clean_environ() | {
            "BENCH_SLOTS": str(self.slots),
            "BENCH_JOBS": str(self.jobs),
            "BENCH_SLEEP": str(self.sleep),
            "BENCH_STEP": str(self.step),
            "BENCH_TEXT": str(TEXT_BYTES),
            "BENCH_POSTGRES": self.dsn,
            "BENCH_REDIS": self.redis.url,
            "BENCH_NODE": str(TOOLS / "node"),
            "PYTHONPATH": f"{HERE}:{ROOT}:{ROOT / 'src'}",  # of this checkout, whatever is installed
        }


@contextmanager
def private(
    jobs: int, *, sleep: float = 0.0, step: float = 0.02, settings: Mapping[str, str] | None = None
) -> Iterator[Arena]:
    """An arena that is gone after the block."""
    folder = Path(tempfile.mkdtemp(prefix="pmqd-b-"))
    arena = Arena(folder, jobs, sleep, step, settings or {})
    try:
        arena.start()
        yield arena
    finally:
        arena.stop()
        _remove(folder)


def _remove(folder: Path) -> None:
    """Without an error, which would hide why it is time to go: an initdb that Ctrl-C cut writes on for a moment."""
    until = time.monotonic() + _REMOVE_SECONDS
    while folder.exists() and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
