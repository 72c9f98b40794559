"""What processes have used: CPU time and memory, as the kernel counts them."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.peers.arena import Arena
from benchmarks.peers.workers import Workers

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Usage:
    """CPU seconds since their start."""

    workers: float
    postgres: float
    redis: float

    def __sub__(self, earlier: "Usage") -> "Usage":
        return Usage(
            self.workers - earlier.workers, self.postgres - earlier.postgres, self.redis - earlier.redis
        )


def used(arena: Arena, workers: Workers) -> Usage:
    """What everything has used so far."""
    return Usage(
        cpu_seconds(workers.pids()), cpu_seconds(family(arena.postgres.pid)), cpu_seconds([arena.redis.pid])
    )


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of processes, and of the children that they have reaped: a backend's counts after its end."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / _TICKS


def machine_seconds() -> float:
    """CPU seconds that the machine has worked for anybody: user, nice, system, interrupts, stolen by other guests."""
    fields = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]))
    return (sum(fields) - fields[3] - fields[4]) / _TICKS  # not idle, nor waiting for a disk


def own_seconds() -> float:
    """CPU seconds of this process and of all children that have ended."""
    return sum(os.times()[:4])


def family(pid: int) -> list[int]:
    """A process and what came from it and lives."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def pss_mb(pids: Iterable[int]) -> float:
    """The memory of processes in MB (10^6 bytes), shared pages counted in parts."""
    kilobytes = 0
    for pid in pids:
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kilobytes += int(line.split()[1])
    return kilobytes * 1024 / 1e6
