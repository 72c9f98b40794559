"""Proves a run's invariants from its history and the final state of both stores, or shows the first histories that break them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psycopg
import redis
from psycopg import sql

from pmqd.chaos import checks_history, checks_stores, history
from pmqd.chaos.checks_history import EPOCH_US, Fault, Story, Stretches, Surroundings
from pmqd.chaos.checks_job import Sums, judge
from pmqd.chaos.checks_runs import Around, Clocks
from pmqd.chaos.checks_time import (
    OVERTAKEN_CLAIMING,
    OVERTAKEN_MARKING,
    STANDSTILL_SECONDS,
    most_overtaken,
)
from pmqd.chaos.checks_walk import Problem

COUNTS: Final = (
    "lost", "unknown", "doubled", "resurrected", "illegal_transition", "overlapped", "over_attempted", "early",
    "stale_settled", "false_rescue", "stuck", "effects_doubled", "order", "standstill", "leftovers_redis",
    "claims_left", "counters_off",
)  # fmt: skip
"""What may be broken; all of them zero is what is to be proved."""
SHOWN: Final = 3
"""Histories kept of each violation."""

_ALLOWED: Final = frozenset({"overlapped_after_lost_lease"})
_SETTLED_US: Final = 5_000_000
_HOST_STARTS_US: Final = 10_000_000
"""A dozen processes that import their modules: a second where they have the machine to themselves, ten where they have not."""
_REDIS_AREAS: Final = frozenset({"redis", "redis wire"})
_REMOTE_SLACK_US: Final = 50_000
_LEASE_RAN_OUT: Final = "%the lease of the instance that ran it ran out%"


@dataclass
class Report:
    """What the checker found.

    Attributes:
        jobs: acknowledged enqueues.
        counts: violations by name; all zero if everything held.
        re_executed: jobs whose handler was started again because its process was gone.
        slowest_recovery: seconds from a death to the last of its jobs given back.
        first: the first offending histories of each violation: what is wrong, then all lines of that job.
        notes: figures that are no violations: the longest standstill, the most that a job was overtaken, and how much was looked at.
        held: nothing is broken.
    """

    jobs: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    re_executed: int = 0
    slowest_recovery: float = 0.0
    first: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        """Whether every invariant held."""
        return not any(self.counts.values())

    def add(self, problem: Problem, story: Story | None = None) -> None:
        """Counts a violation, and keeps its history if it is one of the first of its name."""
        name, text = problem
        if name in _ALLOWED:
            self.notes[name] = self.notes.get(name, 0) + 1
            return
        self.counts[name] += 1
        if self.counts[name] <= SHOWN:
            self.first.setdefault(name, []).extend([text, *(story.lines() if story is not None else [])])


def check(
    folder: Path,
    dsn: str,
    schema: str,
    redis_url: str,
    prefix: str,
    metrics: list[str],
    *,
    own_clock: bool = True,
) -> Report:
    """Checks a run that has ended.

    Args:
        folder: of the run; the history is in it.
        dsn: PostgreSQL itself.
        schema: pmqd's.
        redis_url: Redis itself.
        prefix: of the keys there.
        metrics: the text of `/metrics` of each host at the end, and of each life of a host that ended before.
        own_clock: the database's clock is this machine's.
    """
    report = Report()
    with contextlib.ExitStack() as stack:
        # Three at once: transitions, rows, and questions in between.
        connections = [stack.enter_context(psycopg.connect(dsn, autocommit=True)) for _ in range(3)]
        seen = _check_jobs(report, folder / "history", connections, schema, own_clock=own_clock)
        for problem in _of_stores(connections[0], schema, metrics, seen):
            report.add(problem)
    with redis.Redis.from_url(redis_url) as client:
        for problem in checks_stores.redis_leftovers(client, prefix):
            report.add(problem)
    return report


def _check_jobs(
    report: Report,
    folder: Path,
    connections: Sequence[psycopg.Connection[Any]],
    schema: str,
    *,
    own_clock: bool,
) -> Surroundings:
    """Every job, then the order and the pace of them all; gives what happened around them."""
    seen = checks_history.surroundings(folder)
    handlers = checks_history.lines_by_job([folder / history.HANDLERS])
    producers = checks_history.lines_by_job(sorted(folder.glob(f"{history.PRODUCERS}-*")))
    seen.last_sign = _last_signs(handlers)
    clocks = _clocks(handlers, connections[2], own_clock=own_clock)
    around = Around(seen, clocks, _lost_lease(connections[2], schema, seen))
    sums = Sums()
    connections[0].execute("set work_mem = '256MB'")
    moved, final = checks_history.transitions(connections[0]), checks_history.rows(connections[1], schema)
    for story in checks_history.stories(moved, final, handlers, producers):
        for problem in judge(story, around, sums):
            report.add(problem, story)
    report.jobs, report.re_executed = sums.acknowledged, sums.re_executed
    report.slowest_recovery = sums.slowest_recovery / 1e6
    _check_times(report, sums, seen, clocks)
    return seen


def _last_signs(handlers: Sequence[bytes]) -> dict[int, int]:
    """When each process wrote its last line."""
    found: dict[int, int] = {}
    for line in handlers:
        words = line.split(b" ", 6)
        pid, moment = int(words[4]), int(words[5]) // 1000
        if found.get(pid, 0) < moment:
            found[pid] = moment
    return found


def _clocks(handlers: Sequence[bytes], connection: psycopg.Connection[Any], *, own_clock: bool) -> Clocks:
    """How times compare: not at all where this machine's clock was set.

    The fault `clock_back` does not set it: what the trigger writes is pg_catalog's own time.
    """
    before = time.time()
    row = connection.execute("select extract(epoch from clock_timestamp())::float8").fetchone()
    after = time.time()
    assert row is not None
    ahead = 0 if own_clock else round((row[0] - (before + after) / 2) * 1e6)
    wall_to_mono = (time.monotonic_ns() - time.time_ns()) // 1000
    slack = 2_000 if own_clock else _REMOTE_SLACK_US + round((after - before) * 1e6)
    return Clocks(ahead - EPOCH_US, EPOCH_US - ahead + wall_to_mono, -1 if _stepped(handlers) else slack)


def _stepped(handlers: Sequence[bytes]) -> bool:
    """Whether this machine's clock was set during the run: its distance from the monotonic one changed."""
    distances = []
    for line in handlers[:: max(1, len(handlers) // 1000)]:
        words = line.split()
        distances.append(int(words[6]) - int(words[5]) // 1000)
    return bool(distances) and max(distances) - min(distances) > 20_000


def _lost_lease(
    connection: psycopg.Connection[Any], schema: str, seen: Surroundings
) -> Callable[[bytes], bool]:
    """Asks whether a job was taken from an instance whose lease ran out; only a fault that keeps a host away explains that."""
    query = sql.SQL(
        "select exists (select from {} where job_id = %s and status = 'crashed' and log_message like %s)"
    ).format(sql.Identifier(schema, "job_logs"))
    explained = any(fault.area == "absence" for fault in seen.faults)

    def ask(job: bytes) -> bool:
        if not explained:
            return False
        row = connection.execute(query, [UUID(bytes=job), _LEASE_RAN_OUT]).fetchone()
        return bool(row and row[0])

    return ask


def _check_times(report: Report, sums: Sums, seen: Surroundings, clocks: Clocks) -> None:
    """Order where no fault acted, pace where none but Redis' and the migrator's did."""
    if not clocks.comparable:
        return
    quiet = Stretches([_around(fault.began, fault.ended, clocks) for fault in seen.faults])
    worst = 0
    for (queue, band), line in sums.lines.items():
        for what, taken, allowed, excused in (
            ("marked", line.placed, OVERTAKEN_MARKING, line.hinted),  # they were neither marked nor stolen
            ("claimed", line.claimed, OVERTAKEN_CLAIMING, ()),
        ):
            passed, _, looked_at = most_overtaken(line, taken, quiet, excused)
            name = f"order_{what}_worst"
            report.notes[name] = max(report.notes.get(name, 0), passed)
            report.notes[f"order_{what}_seen"] = report.notes.get(f"order_{what}_seen", 0) + looked_at
            worst = max(worst, passed)
            if passed > allowed:
                report.add(
                    ("order", f"{queue}, {band}: a job was {what} before {passed} that were ready before it")
                )
    stopping = [
        fault
        for fault in seen.faults
        if fault.area not in _REDIS_AREAS and not fault.name.startswith("migrator")
    ]
    away = Stretches([while_stopped(fault, clocks) for fault in stopping])
    longest = sums.pace.longest_standstill(away) / 1e6
    report.notes["standstill_seconds"] = longest
    if longest > STANDSTILL_SECONDS:
        report.add(("standstill", f"nothing was claimed for {longest:.1f} s though jobs were ready"))


def while_stopped(fault: Fault, clocks: Clocks) -> tuple[int, int]:
    """For how long a fault may keep anything from being claimed, on the database's clock (µs): a host has to start first."""
    began, ended = _around(fault.began, fault.ended, clocks)
    return began, ended + (_HOST_STARTS_US if fault.name.startswith("host_") else 0)


def _around(began: int, ended: int, clocks: Clocks) -> tuple[int, int]:
    """A fault's time on the database's clock, with what it takes to get over it."""
    return began - clocks.to_monotonic, ended - clocks.to_monotonic + _SETTLED_US


def _of_stores(
    connection: psycopg.Connection[Any], schema: str, metrics: Sequence[str], seen: Surroundings
) -> Iterator[Problem]:
    yield from checks_stores.claims_left(connection, schema)
    yield from checks_stores.effects(connection, schema)
    yield from checks_stores.logs_as_transitions(connection, schema)
    if metrics:
        to_database = (time.time_ns() - time.monotonic_ns()) // 1000
        orphaned = checks_stores.orphaned_rows(connection, schema, seen.masters, to_database)
        wanted = checks_stores.recorded(connection, schema)
        yield from checks_stores.counters(checks_stores.counted(metrics), wanted, orphaned, seen)
