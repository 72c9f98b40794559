"""Every worker killed in mid-run, new ones at once: `python -m benchmarks.crash [pmqd pmqd-host pgqueuer ...] [--json FILE]`.

4,000 jobs of 50 ms on 2 processes with 50 slots each (ideal: 2,000 a second). After 1,600 starts all workers get SIGKILL in one
moment and new ones are started at once; then it is watched until all jobs are done, or nothing has moved for 45 s.
The job bodies write outside all stores (`benchmarks/peers/slots.py`), so a lost job is an empty slot.
"""

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers import slots
from benchmarks.peers.arena import Arena, private
from benchmarks.peers.field import FIELD, wait
from benchmarks.peers.tools import install

JOBS = 4000
SLEEP = 0.05
KILL_AT = 1600
STILL_SECONDS = 45.0
USUAL = ("pmqd", "pmqd-host", "pgqueuer", "graphile-worker", "celery", "dramatiq")


@dataclass(frozen=True)
class Result:
    """What became of the jobs."""

    peer: str
    jobs: int
    started_at_kill: int
    cut: int
    undone: int
    never_started: int
    last_progress_seconds: float
    watched_seconds: float


def measure(name: str) -> Result:
    """One contestant, on servers of its own."""
    with private(JOBS, sleep=SLEEP) as arena:
        FIELD[name].fill(arena)
        arena.settled()
        return _kill_and_watch(name, arena)


def _kill_and_watch(name: str, arena: Arena) -> Result:
    workers = FIELD[name].workers(arena)
    workers.start()
    try:
        if not wait(lambda: _count(arena, 0) >= KILL_AT, 60):
            raise SystemExit(f"{name} did not start {KILL_AT} jobs within a minute")
        workers.kill()
        killed = time.monotonic_ns()
        starts, ends = slots.read(str(arena.slots), JOBS)
        workers.start()
        _watch(arena)
        watched = time.monotonic_ns()
        later_starts, later_ends = slots.read(str(arena.slots), JOBS)
    finally:
        workers.stop()
    return Result(
        name,
        JOBS,
        sum(map(bool, starts)),
        sum(1 for start, end in zip(starts, ends, strict=True) if start > end),
        later_ends.count(0),
        later_starts.count(0),
        max(0, max(later_ends) - killed) / 1e9,
        (watched - killed) / 1e9,
    )


def _watch(arena: Arena) -> None:
    """Until all is done, or nothing has moved for long."""
    done, moved = -1, time.monotonic()
    while (now_done := _count(arena, 1)) < JOBS and time.monotonic() - moved < STILL_SECONDS:
        if now_done != done:
            done, moved = now_done, time.monotonic()
        time.sleep(0.05)


def _count(arena: Arena, which: int) -> int:
    return sum(map(bool, slots.read(str(arena.slots), JOBS)[which]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints one line per contestant."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description=__doc__)
    parser.add_argument(
        "peers", nargs="*", metavar="PEER", help=f"of {', '.join(FIELD)}; without: {', '.join(USUAL)}"
    )
    parser.add_argument("--json", type=Path, help="write the results there too")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.peers if name not in FIELD]
    if unknown:
        parser.error(f"unknown peer {unknown[0]!r}: allowed are {', '.join(FIELD)}")
    names = given.peers or list(USUAL)
    if any(not name.startswith("pmqd") for name in names):
        install()
    print(f"{platform.platform()}, Python {platform.python_version()}: {JOBS} jobs of {SLEEP * 1000:.0f} ms")
    print(
        f"{'peer':<16}{'started':>9}{'cut':>6}{'undone':>8}{'never started':>15}{'last progress':>15}{'watched':>10}"
    )
    results = []
    for name in names:
        each = measure(name)
        results.append(asdict(each))
        print(
            f"{each.peer:<16}{each.started_at_kill:>9}{each.cut:>6}{each.undone:>8}{each.never_started:>15}"
            f"{each.last_progress_seconds:>13.1f} s{each.watched_seconds:>8.0f} s",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
