"""What every job body does: it writes CLOCK_MONOTONIC into its own slots of a shared file.

One `pwrite` costs a microsecond, so no peer pays for a counter in a store, and a lost job is an empty slot. Imports nothing
but the standard library: it runs in each peer's own environment. BENCH_SLOTS names the file, BENCH_JOBS how many jobs there are.
"""

import os
import struct
import time

JOBS = int(os.environ.get("BENCH_JOBS", "0"))
SLEEP = float(os.environ.get("BENCH_SLEEP", "0"))
_file = os.open(os.environ["BENCH_SLOTS"], os.O_RDWR) if "BENCH_SLOTS" in os.environ else -1


def start(number: int) -> None:
    """Job `number` starts."""
    _write(number)


def end(number: int) -> None:
    """Job `number` has done its work."""
    _write(JOBS + number)


def read(path: str, jobs: int) -> tuple[list[int], list[int]]:
    """Nanoseconds of each job's last start and last end; 0 is never."""
    with open(path, "rb") as file:  # noqa: PTH123 - no pathlib in the hot path's module
        found = struct.unpack(f"={2 * jobs}q", file.read(16 * jobs))
    return list(found[:jobs]), list(found[jobs:])


def _write(slot: int) -> None:
    os.pwrite(_file, struct.pack("=q", time.monotonic_ns()), 8 * slot)
