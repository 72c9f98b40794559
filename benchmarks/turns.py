"""The turns: in every round each work is done by each contestant, one after the other."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psycopg

from benchmarks.peers.arena import Failure
from benchmarks.report import Row
from benchmarks.usage import machine_seconds, own_seconds
from benchmarks.works.work import Scale, Work
from pmqd.errors import PmqdError

STRANGE_SHARE = 0.1
"""Of the CPU time: what is not ours. The kernel's own threads take less."""
_EXPECTED = (Failure, PmqdError, psycopg.Error, subprocess.SubprocessError, OSError)


@dataclass(frozen=True)
class Plan:
    """What a command line asks for."""

    works: Sequence[Work]
    peers: Sequence[str]
    rounds: int
    scale: Scale

    def contestants(self, work: Work) -> list[str]:
        """Who does this work, in the order of the first round."""
        return [name for name in work.peers if work.own or name in self.peers]


@dataclass
class Result:
    """What there is so far.

    Attributes:
        rows: the figures.
        failures: contestants that could not be measured, and why.
    """

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run(plan: Plan, result: Result, keep: Callable[[Sequence[Row]], None]) -> None:
    """All rounds; every second one in reverse order, so that nobody always comes after the same other.

    Args:
        plan: what is wanted.
        result: is filled; what it holds when this is interrupted is true.
        keep: is given all rows after each measurement.
    """
    for number in range(1, plan.rounds + 1):
        for work in plan.works:
            names = plan.contestants(work)
            for name in names if number % 2 else reversed(names):
                _measure(plan, result, work, name, number)
                keep(result.rows)


def _measure(plan: Plan, result: Result, work: Work, name: str, number: int) -> None:
    begun, worked, own = time.monotonic(), machine_seconds(), own_seconds()
    where = f"round {number} of {plan.rounds}, {work.name}, {name}"
    try:
        figures = work.peers[name](plan.scale)
    except _EXPECTED as error:  # one contestant's end is not the others'
        result.failures.append(f"{where}: {type(error).__name__}: {error}")
        print(f"FAILED {result.failures[-1]}", file=sys.stderr, flush=True)
        return
    result.rows += [Row(work.name, name, number, unit, value) for unit, value in figures]
    unit, value = figures[0]
    seconds = time.monotonic() - begun
    strange = (machine_seconds() - worked - (own_seconds() - own)) / (seconds * len(os.sched_getaffinity(0)))
    disturbed = f", others took {strange:.0%} of the machine" if strange > STRANGE_SHARE else ""
    print(f"{where}: {value:,.3f} {unit} ({seconds:.0f} s{disturbed})", file=sys.stderr, flush=True)
