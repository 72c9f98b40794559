"""Signals at random instants under load: `python -m benchmarks.signals [--terms 1000] [--hups 200] [--broken 100] [--seed 1]`.

Three daemons on the same stores are told to stop (SIGTERM) at random instants of their lives, start-up included, and started
again; then one daemon is told to reload at random instants, with good files and with broken ones. Meanwhile jobs of all lengths
keep coming. Afterwards the stores are asked: no job failed, none charged, interruptions only where a drain ran out.
"""

import argparse
import platform
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

from benchmarks.recovery import Rig, rig, wait
from tests.fix_daemon import Daemon
from tests.history import quantile, statuses

DAEMONS = 3
PROCESSES = 2
DRAIN_SECONDS = 1.0
LONG_SECONDS = 1.2
LIFE_SECONDS = 1.5
"""A daemon gets its SIGTERM within so many seconds: of its being ready, or (one of five) of its start."""
BACKLOG = 300
DONE = ("reload done",)
REFUSED = ("reload refused", "reload failed")


@dataclass
class Load:
    """Keeps a backlog of jobs: most do nothing, some take a while, a few are longer than a drain."""

    rig: Rig
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Enqueues until it is stopped."""
        with self.rig.connect() as connection:
            while not self.stop.wait(0.2):
                found = connection.execute("select count(*) from pmqd.jobs where ready").fetchone()
                if found is None or found[0] > BACKLOG:
                    continue
                for kind, seconds, count in (
                    ("nothing", 0.0, 150),
                    ("nap", 0.05, 10),
                    ("nap", LONG_SECONDS, 1),
                ):
                    payload = "{}" if kind == "nothing" else f'{{"seconds": {seconds}}}'
                    connection.execute(
                        "insert into pmqd.jobs (queue_name, kind, payload)"
                        " select 'trial', %s, %s::jsonb from generate_series(1, %s)",
                        (kind, payload, count),
                    )


def terms(one: Rig, count: int, seed: int) -> None:
    """So many SIGTERMs, three daemons at a time."""
    numbers = [range(first, count, DAEMONS) for first in range(DAEMONS)]

    def loop(first: int) -> list[float]:
        chance = random.Random(f"{seed}/{first}")
        took = []
        for number in numbers[first]:
            ready = chance.random() < 0.8
            took.append(_one_life(one, first, chance.uniform(0.0, LIFE_SECONDS), ready=ready))
            if number % 50 < DAEMONS and first == 0:
                print(f"  {number} of {count} SIGTERMs", file=sys.stderr, flush=True)
        return took

    with ThreadPoolExecutor(DAEMONS) as pool:
        took = sorted(each for part in pool.map(loop, range(DAEMONS)) for each in part)
    print(
        f"{len(took)} SIGTERMs, all ended with 0: SIGTERM -> end p50 {quantile(took, 0.5):.2f} s, p99 {quantile(took, 0.99):.2f} s,"
        f" max {took[-1]:.2f} s (drain {DRAIN_SECONDS:g} s)",
        flush=True,
    )


def _one_life(one: Rig, number: int, seconds: float, *, ready: bool) -> float:
    daemon = one.daemon(f"t{number}", drain_seconds=DRAIN_SECONDS)
    if ready:
        daemon.wait_ready(60)
    time.sleep(seconds)
    begun = time.monotonic()
    daemon.signal(signal.SIGTERM)
    code = daemon.process.wait(60)
    took = time.monotonic() - begun
    # Before its handlers stand a Python process dies of SIGTERM like any other; nothing was started then.
    if code not in (0, -signal.SIGTERM):
        sys.exit(f"SIGTERM {seconds:.3f} s after the start: exit code {code}\n{daemon.log[-3000:]}")
    daemon.log_path.unlink()
    return took


def hups(one: Rig, good: int, broken: int, seed: int) -> None:
    """Reloads of one daemon, good ones and broken ones in random order."""
    chance = random.Random(f"{seed}/hup")
    daemon = one.daemon("h", drain_seconds=10.0).wait_ready()
    order = ["good"] * good + ["broken"] * broken
    chance.shuffle(order)
    kept = 0
    for number, what in enumerate(order):
        time.sleep(chance.uniform(0.0, 0.5))
        if what == "good":
            _reload(daemon, daemon.settings, DONE)
        else:
            before = _settled_workers(daemon)
            _reload(daemon, _broken(daemon.settings, number), REFUSED)
            kept += before == _settled_workers(daemon)
            daemon.write_config(daemon.settings)
        if number % 50 == 0:
            print(f"  {number} of {len(order)} SIGHUPs", file=sys.stderr, flush=True)
    print(
        f"{good} SIGHUPs with a good file; {broken} with a broken one, the old generation lived on in {kept}",
        flush=True,
    )
    if daemon.stop() != 0 or kept != broken:
        sys.exit("a broken reload replaced workers, or the daemon ended badly")


def _broken(settings: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A bad value, an unknown setting, an application that is not there, one that raises while it is imported."""
    pool = settings["workers"][0]
    changes: tuple[dict[str, Any], ...] = (
        {"drain_seconds": -1},
        {"no_such_setting": 1},
        {"workers": [pool | {"app": "tests.applications.absent:app"}]},
        {"workers": [pool | {"app": "benchmarks.broken_application:app"}]},
    )
    return {**settings, **changes[number % 4]}


def _reload(daemon: Daemon, settings: Any, words: tuple[str, ...]) -> None:
    """Sends SIGHUP and waits until the master has said how it ended."""
    daemon.write_config(settings)
    before = _said(daemon, words)
    daemon.signal(signal.SIGHUP)
    wait(lambda: _said(daemon, words) > before, 60, f"a reload of which is said {words[0]!r}")


def _said(daemon: Daemon, words: tuple[str, ...]) -> int:
    log = daemon.log
    return sum(log.count(each) for each in words)


def _settled_workers(daemon: Daemon) -> set[int]:
    """The workers once those of a former generation have ended what they ran, and no candidate of a new one is left."""

    def found() -> set[int] | None:
        pids = {process.pid for process in daemon.children("worker")}
        return pids if len(pids) == PROCESSES else None

    pids: set[int] = wait(found, 30, f"{PROCESSES} workers")
    return pids


def account(one: Rig) -> None:
    """What the stores say when everything is done.

    Raises:
        SystemExit: a job failed, was charged, or was interrupted although a drain would have sufficed.
    """
    with one.connect() as connection:
        wait(
            lambda: set(statuses(connection)) <= {"completed", "failed", "cancelled"}, 180, "everything done"
        )
        found = statuses(connection)
        # The sixth interruption of a life is charged (docs/states.md): told apart, and no fault.
        charged = _one(
            connection, "select count(*) from pmqd.jobs where attempt_count <> 1 and interruptions < 5"
        )
        worn = _one(
            connection, "select count(*) from pmqd.jobs where attempt_count <> 1 and interruptions >= 5"
        )
        logs: Counter[tuple[str, bool]] = Counter()
        for status, is_long, count in connection.execute(
            "select l.status, (j.payload ->> 'seconds')::float is not distinct from %s, count(*)"
            " from pmqd.job_logs l join pmqd.jobs j on j.id = l.job_id group by 1, 2",
            (LONG_SECONDS,),
        ):
            logs[status, is_long] = count
        interrupted = _one(connection, "select coalesce(sum(interruptions), 0) from pmqd.jobs")
        suspects = connection.execute(
            "select l.job_id, j.payload, j.interruptions, l.attempt_number, l.status, l.worker_id, l.started, l.finished, l.log_message"
            " from pmqd.jobs j join pmqd.job_logs l on l.job_id = j.id where j.attempt_count <> 1 order by l.job_id, l.id"
        ).fetchall()
        twice = _one(
            connection,
            "select count(*) from (select from pmqd.job_logs where status = 'success' group by job_id having count(*) > 1) d",
        )
    short = sum(n for (status, is_long), n in logs.items() if status != "success" and not is_long)
    print(
        f"jobs {found}; charged {charged} (and {worn} with their sixth interruption), completed twice {twice};"
        f" interruptions {interrupted} (all of jobs longer than the drain: {short == 0})",
        flush=True,
    )
    if set(found) != {"completed"} or charged or twice or short:
        sys.exit(f"not as promised: {dict(logs)}\n" + "\n".join(map(str, suspects)))


def _one(connection: Any, query: str) -> int:
    return int(connection.execute(query).fetchone()[0])


def main() -> None:
    """Runs both parts and asks the stores after each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signals", description=__doc__)
    parser.add_argument("--terms", type=int, default=1000)
    parser.add_argument("--hups", type=int, default=200)
    parser.add_argument("--broken", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(f"{platform.platform()}, Python {platform.python_version()}, seed {given.seed}", flush=True)
    with rig() as one:
        for part in (
            partial(terms, one, given.terms, given.seed),
            partial(hups, one, given.hups, given.broken, given.seed),
        ):
            load = Load(one)
            thread = threading.Thread(target=load.run)
            thread.start()
            try:
                part()
            finally:
                load.stop.set()
                thread.join()
            last = one.daemon("last").wait_ready()
            account(one)
            last.stop()


if __name__ == "__main__":
    try:
        main()
    except httpx.HTTPError as error:
        sys.exit(f"the daemon's web child: {error}")
