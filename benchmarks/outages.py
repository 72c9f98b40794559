"""PostgreSQL crashes and outages under load: `python -m benchmarks.outages [--crashes 30] [--longest 300] [--seed 1]`.

PostgreSQL is stopped as by a crash and started again, after random short outages and one long one, while a daemon with two
workers works off a backlog. Counted: jobs that were given back although their owner lived, how soon something is claimed
again, and file descriptors. Ends with 1 if a bar is missed.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any

import psutil
import psycopg

from benchmarks.recovery import Rig, rig
from tests.fix_daemon import Daemon
from tests.history import quantile

BACKLOG = 3000
WORKERS = 2
FIRST_CLAIM_SECONDS = 2.0


@dataclass
class Result:
    """What the outages did.

    Attributes:
        first_claims: seconds from the first connection that PostgreSQL took to the first claim after it.
        outages: seconds that it was away.
        jobs: all jobs, done in the end.
        rescued: rows of the audit trail that say `crashed`.
        interrupted: jobs with interruptions.
        retried: jobs that needed more than one attempt.
        unsettled: jobs that are not completed in the end.
        lines: what the daemon logged as an error, the absence of PostgreSQL aside.
        descriptors: of each process, before and after.
    """

    first_claims: list[float] = field(default_factory=list)
    outages: list[float] = field(default_factory=list)
    jobs: int = 0
    rescued: int = 0
    interrupted: int = 0
    retried: int = 0
    unsettled: int = 0
    lines: list[str] = field(default_factory=list)
    descriptors: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def false_rescues(self) -> int:
        """Jobs that were taken from an owner that lived, or charged for what was not theirs."""
        return self.rescued + self.interrupted + self.retried

    def faults(self) -> list[str]:
        """The bars that were missed, in words."""
        # A worker opens two connections to Redis when it first needs them: for commands, and for the high band in a flood.
        grown = [each for each in self.descriptors if each[2] > each[1] + 2]
        checks = [
            (self.false_rescues, f"{self.false_rescues} false rescues"),
            (self.unsettled, f"{self.unsettled} jobs are not completed"),
            (self.slow, f"{self.slow} first claims later than {FIRST_CLAIM_SECONDS:g} s"),
            (grown, f"file descriptors grew: {grown}"),
            (self.lines, f"{len(self.lines)} lines of complaint, the first: {self.lines[:1]}"),
        ]
        return [text for wrong, text in checks if wrong]

    @property
    def slow(self) -> int:
        """First claims that missed their bar."""
        return sum(seconds > FIRST_CLAIM_SECONDS for seconds in self.first_claims)


def measure(
    one: Rig,
    outages: list[float],
    progress: Callable[[str], None] = lambda _: None,
    *,
    backlog: int = BACKLOG,
) -> Result:
    """Runs the outages one after the other.

    Args:
        one: started servers.
        outages: seconds that each lasts.
        progress: told a line after each.
        backlog: jobs that wait when one begins.
    """
    daemon = one.start_daemon()
    result = Result(outages=outages)
    fill(one, backlog)
    wait(lambda: workers(one) == WORKERS, 30, "a job of each worker: then each has its connections")
    before = descriptors(daemon)
    for number, seconds in enumerate(outages, start=1):
        fill(one, backlog)
        one.postgres.kill()
        time.sleep(seconds)
        one.postgres.start()
        accepted = clock(one)
        claimed = wait(partial(first_claim, one, accepted), 60, "a claim")
        result.first_claims.append((claimed - accepted).total_seconds())
        progress(
            f"{number}/{len(outages)}: away {seconds:.1f} s, first claim after {result.first_claims[-1]:.3f} s"
        )
    wait(lambda: unsettled(one) == 0, 300, "all jobs done")
    after = wait(lambda: settled_descriptors(daemon, before), 20, "the descriptors")
    result.descriptors = [(title, before[pid, title], after.get((pid, title), 0)) for pid, title in before]
    count(one, result)
    daemon.stop()
    result.lines = [
        record["message"]
        for record in daemon.records
        if record["level"] == "error" and not record["message"].startswith("PostgreSQL is away")
    ]
    return result


def settled_descriptors(daemon: Daemon, before: dict[tuple[int, str], int]) -> dict[tuple[int, str], int]:
    """The descriptors once none is above what it was; after a while, whatever they are."""
    deadline = time.monotonic() + 10
    while True:
        now = descriptors(daemon)
        if all(now.get(key, 0) <= number for key, number in before.items()) or time.monotonic() > deadline:
            return now
        time.sleep(0.2)


def fill(one: Rig, backlog: int) -> None:
    """Short jobs, so that there is always one to claim."""
    with one.connect() as connection:
        connection.execute(
            "insert into pmqd.jobs (queue_name, kind, payload)"
            " select 'trial', 'nap', '{\"seconds\": 0.01}' from generate_series(1, greatest(0, %s - ("
            "   select count(*) from pmqd.jobs where ready)))",
            [backlog],
        )


def clock(one: Rig) -> datetime:
    """The database's clock, by the first connection that it takes."""
    with one.connect() as connection:
        row = connection.execute("select clock_timestamp()").fetchone()
    assert row is not None
    now: datetime = row[0]
    return now


def first_claim(one: Rig, after: Any) -> Any:
    """When something was first claimed after a moment of the database's clock."""
    try:
        with one.connect() as connection:
            row = connection.execute(
                "select min(started_at) from pmqd.jobs where started_at > %s", [after]
            ).fetchone()
    except psycopg.OperationalError:
        return None
    return row and row[0]


def workers(one: Rig) -> int:
    """How many workers have done something."""
    fill(one, 10)
    with one.connect() as connection:
        row = connection.execute("select count(distinct worker_id) from pmqd.job_logs").fetchone()
    return int(row[0]) if row else 0


def unsettled(one: Rig) -> int:
    """Jobs that are not completed."""
    with one.connect() as connection:
        row = connection.execute("select count(*) from pmqd.jobs where status <> 'completed'").fetchone()
    return int(row[0]) if row else 0


def count(one: Rig, result: Result) -> None:
    """Fills in what the database says in the end."""
    with one.connect() as connection:
        row = connection.execute(
            "select count(*), count(*) filter (where interruptions > 0), count(*) filter (where attempt_count <> 1),"
            " count(*) filter (where status <> 'completed'),"
            " (select count(*) from pmqd.job_logs where status = 'crashed') from pmqd.jobs"
        ).fetchone()
    assert row is not None
    result.jobs, result.interrupted, result.retried, result.unsettled, result.rescued = row


def descriptors(daemon: Daemon) -> dict[tuple[int, str], int]:
    """Open file descriptors by process."""
    found = {}
    for process in daemon.family():
        try:
            found[process.pid, " ".join(process.cmdline())[:40]] = process.num_fds()
        except psutil.Error:
            continue
    return found


def wait(predicate: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait for a condition.

    Raises:
        TimeoutError: it did not come true.
    """
    deadline = time.monotonic() + seconds
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)
    return value


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--crashes", type=int, default=30, help="how often PostgreSQL crashes")
    parser.add_argument("--longest", type=float, default=300.0, help="seconds of the one long outage")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    random_ = random.Random(given.seed)
    outages = [random_.uniform(0.0, 4.0) for _ in range(given.crashes - 1)]
    outages.insert(len(outages) // 2, given.longest)
    with rig() as one:
        result = measure(one, outages, lambda line: print(line, flush=True))
    print(
        f"{len(outages)} crashes, away {sum(outages):.0f} s in all, once {max(outages):.0f} s; {result.jobs} jobs\n"
        f"first claim after PostgreSQL took connections: p50 {quantile(result.first_claims, 0.5):.3f} s,"
        f" p99 {quantile(result.first_claims, 0.99):.3f} s, max {max(result.first_claims):.3f} s\n"
        f"false rescues {result.false_rescues}, not completed {result.unsettled}\n"
        f"descriptors (before, after): {', '.join(f'{t} {b} {a}' for t, b, a in result.descriptors)}"
    )
    faults = result.faults()
    print(*(f"MISSED: {fault}" for fault in faults), sep="\n")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
