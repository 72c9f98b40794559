"""What every job body does: it writes CLOCK_MONOTONIC into its own slots of a shared file.

One `pwrite` costs a microsecond, so no peer pays for a counter in a store, and a lost job is an empty slot. Imports nothing
but the standard library: it runs in each peer's own environment, which is told by BENCH_SLOTS where the file is, by
BENCH_JOBS how many jobs there are, by BENCH_SLEEP how long each sleeps, and so on.
"""

import asyncio
import os
import struct
import time
from collections.abc import Iterator

JOBS = int(os.environ.get("BENCH_JOBS", "0"))
SLEEP = float(os.environ.get("BENCH_SLEEP", "0"))
STEP = float(os.environ.get("BENCH_STEP", "0.02"))
"""Seconds from one enqueue to the next where they are paced."""
PACED = int(os.environ.get("BENCH_PACED", JOBS))
"""How many are: the first ones."""
BATCH = int(os.environ.get("BENCH_BATCH", "1"))
"""How many at once."""
TEXT = "x" * int(os.environ.get("BENCH_TEXT", "0"))
"""What makes the payload as long as a real one."""
REGIONS = 3
"""Of each job its start, its end, and when its enqueue was acknowledged."""
_file = os.open(os.environ["BENCH_SLOTS"], os.O_RDWR) if "BENCH_SLOTS" in os.environ else -1


def start(number: int) -> None:
    """Job `number` starts."""
    _write(number)


def end(number: int) -> None:
    """Job `number` has done its work."""
    _write(JOBS + number)


def enqueued(number: int, count: int = 1) -> None:
    """The enqueue of job `number`, or of so many from there on, has returned."""
    now = struct.pack("=q", time.monotonic_ns())
    os.pwrite(_file, now * count, 8 * (2 * JOBS + number))


def work(number: int) -> None:
    """The body of a plain handler: nothing, or a sleep."""
    start(number)
    if SLEEP:
        time.sleep(SLEEP)
        end(number)


async def work_async(number: int) -> None:
    """The body of an async handler."""
    start(number)
    if SLEEP:
        await asyncio.sleep(SLEEP)
        end(number)


def paced() -> Iterator[int]:
    """The number of each job, or of the first of each batch, at its time; who is late catches up."""
    begun = time.monotonic()
    for turn, number in enumerate(range(0, PACED, BATCH)):
        left = begun + turn * STEP - time.monotonic()
        if left > 0:
            time.sleep(left)
        yield number


def read(path: str, jobs: int) -> tuple[list[int], list[int]]:
    """Nanoseconds of each job's last start and last end; 0 is never."""
    starts, ends, _ = read_all(path, jobs)
    return starts, ends


def read_all(path: str, jobs: int) -> tuple[list[int], list[int], list[int]]:
    """Nanoseconds of each job's last start, last end and enqueue; 0 is never."""
    with open(path, "rb") as file:  # noqa: PTH123 - no pathlib in the hot path's module
        found = struct.unpack(f"={REGIONS * jobs}q", file.read(8 * REGIONS * jobs))
    return list(found[:jobs]), list(found[jobs : 2 * jobs]), list(found[2 * jobs :])


def _write(slot: int) -> None:
    os.pwrite(_file, struct.pack("=q", time.monotonic_ns()), 8 * slot)
