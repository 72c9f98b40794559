"""Hosts in network namespaces, cut off from one store or both as by a pulled cable: nothing passes and nobody is told."""

import time
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from tests.fix_servers import WaitUntil
from tests.history import ends, enqueue, enqueue_many, job, log_statuses, settled_once, starts, statuses
from tests.hosts import Host, Network, later_starts, overlaps, runs, value, watching
from tests.processes import lives

pytestmark = pytest.mark.timeout(240)

APP = "tests.applications.trial:app"
SETTINGS = {
    "workers": [
        {"name": "careful", "app": APP, "queues": ["careful"], "processes": 1},
        {"name": "trial", "app": APP, "queues": ["trial"], "processes": 1},
    ],
    "queues": {"careful": {"isolation": "abort"}},
}
NAP = 45
"""Longer than a host can be cut off before its jobs run elsewhere."""


def completed(connection: psycopg.Connection[Any], *job_ids: UUID) -> bool:
    """Whether all these are."""
    return all(job(connection, each)["status"] == "completed" for each in job_ids)


def all_completed(connection: psycopg.Connection[Any], count: int) -> bool:
    """Whether so many jobs are, and no other is there."""
    return statuses(connection) == {"completed": count}


def test_a_host_cut_off_from_postgres(network: Network, tmp_path: Path, wait_until: WaitUntil) -> None:
    """Three hosts, one cannot reach PostgreSQL: its job of an "abort" queue is killed 25 s later and runs elsewhere only after that; its
    other job runs elsewhere within 35 s, twice at once, and settles once. Meanwhile the others work, and after the healing so does it.
    """
    history = tmp_path / "history"
    environ = {"TRIAL_HISTORY": str(history)}
    with psycopg.connect(network.dsn, autocommit=True) as connection, watching(history) as watch:
        lonely = network.host(SETTINGS, environ)
        until = time.time() + NAP + 10  # the other hosts start first
        careful = enqueue(connection, "nap_until", queue="careful", until=until)
        common = enqueue(connection, "nap_until", until=until)
        wait_until(lambda: len(starts(history)) == 2, what="both run on the first host")
        first = {mark.job_id: mark.pid for mark in starts(history)}
        for _ in range(2):
            network.host(SETTINGS, environ)
        lonely.postgres.cut()
        cut = time.monotonic()
        wait_until(lambda: "PostgreSQL is away" in lonely.running.log, timeout=15, what="noticed")
        noticed = time.monotonic() - cut
        enqueue_many(connection, 300, "nothing")
        wait_until(partial(all_but, connection, 2, 300), timeout=20, what="the others do what comes")
        again = {
            each: wait_until(partial(later_starts, history, each, 1), timeout=60, what="rescued")[0]
            for each in (careful, common)
        }
        rescued = {each: mark.at - cut for each, mark in again.items()}
        killed = watch.died[first[careful]] - cut
        print(  # noqa: T201 - figures for the docs
            f"noticed {noticed:.1f} s, killed {killed:.1f} s, rescued {rescued[careful]:.1f} and {rescued[common]:.1f} s after the cut"
        )
        assert noticed < 8
        assert killed < 27
        assert max(rescued.values()) < 35
        assert lives(first[common]), "it finishes"
        wait_until(lambda: ends(history)[common] >= 1, timeout=60, what="the first run of the other ends")
        lonely.postgres.heal()
        wait_until(partial(completed, connection, careful, common), timeout=90, what="completed")
        wait_until(lambda: ends(history)[common] == 2, timeout=60, what="the second run ends")
        wait_until(lambda: "going on as instance" in lonely.running.log, what="a new identity")
        spans = {each: runs(history, each, watch.died) for each in (careful, common)}
    assert not overlaps(spans[careful])
    assert len(spans[careful]) == len(spans[common]) == 2
    check_end(network, lonely, 302, [careful, common], wait_until)


def all_but(connection: psycopg.Connection[Any], running: int, done: int) -> bool:
    """Whether so many run and so many are completed."""
    return statuses(connection) == {"running": running, "completed": done}


def check_end(
    network: Network, healed: Host, count: int, interrupted: list[UUID], wait_until: WaitUntil
) -> None:
    """After the healing the host works again, and in the stores everything was done once."""
    with psycopg.connect(network.dsn, autocommit=True) as connection:
        for host in network.hosts:
            if host is not healed:
                host.running.stop()
        enqueue_many(connection, 100, "nothing")
        wait_until(
            partial(all_completed, connection, count + 100), timeout=30, what="the healed host does it alone"
        )
        for job_id in interrupted:
            row = job(connection, job_id)
            assert (row["attempt_count"], row["interruptions"]) == (1, 1)
            assert log_statuses(connection, job_id) == ["crashed", "success"]
        settled_once(connection)


def test_a_host_cut_off_from_redis(network: Network, tmp_path: Path, wait_until: WaitUntil) -> None:
    """Two hosts, one cannot reach Redis: it claims straight from PostgreSQL within 4 s, runs what it is given, loses nothing, and uses
    Redis again after the healing.
    """
    history = tmp_path / "history"
    environ = {"TRIAL_HISTORY": str(history)}
    with psycopg.connect(network.dsn, autocommit=True) as connection:
        lonely, other = network.host(SETTINGS, environ), network.host(SETTINGS, environ)
        enqueue_many(connection, 100, "nothing")
        wait_until(partial(all_completed, connection, 100), what="both work")
        lonely.redis.cut()
        cut = time.monotonic()
        wait_until(lambda: "Redis is away" in lonely.running.log, timeout=10, what="noticed")
        print(f"noticed {time.monotonic() - cut:.1f} s after the cut")  # noqa: T201 - a figure for the docs
        for batch in range(1, 6):
            enqueue_many(connection, 100, "nothing")
            wait_until(
                partial(all_completed, connection, 100 + 100 * batch), timeout=10, what="the batch is done"
            )
        other.running.stop()
        enqueue_many(connection, 100, "nothing")
        alone = time.monotonic()
        wait_until(partial(all_completed, connection, 700), timeout=20, what="the lonely host does it alone")
        print(f"100 jobs alone, without Redis, in {time.monotonic() - alone:.1f} s")  # noqa: T201 - a figure for the docs
        lonely.redis.heal()
        wait_until(lambda: "Redis is back" in lonely.running.log, timeout=10, what="Redis is used again")
        enqueue_many(connection, 100, "nothing")
        wait_until(partial(all_completed, connection, 800), timeout=20, what="with Redis again")
        settled_once(connection)
    assert max(ends(history).values()) == 1
    assert len(starts(history)) == 800


def test_the_leading_host_cut_off_from_both_stores(
    network: Network, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Two hosts; the one that leads and ticks is cut off from everything: the other leads within 10.5 s, the ghost's lock is freed
    within 30 s, its jobs run within 35 s, and the "abort" one never twice at once.
    """
    history = tmp_path / "history"
    environ = {"TRIAL_HISTORY": str(history)}
    with psycopg.connect(network.dsn, autocommit=True) as connection, watching(history) as watch:
        lonely = network.host(SETTINGS, environ)
        until = time.time() + NAP + 10  # the other hosts start first
        careful = enqueue(connection, "nap_until", queue="careful", until=until)
        common = enqueue(connection, "nap_until", until=until)
        wait_until(lambda: len(starts(history)) == 2, what="both run on the first host")
        heir = network.host(SETTINGS, environ)
        [ghost] = lock_holders(connection)
        term = value(connection, "select term from pmqd.leader")
        lonely.cut()
        cut = time.monotonic()
        wait_until(
            lambda: value(connection, "select term from pmqd.leader") > term, timeout=20, what="a new term"
        )
        led = time.monotonic() - cut
        enqueue_many(connection, 300, "nothing")
        wait_until(partial(all_but, connection, 2, 300), timeout=20, what="the heir marks, pushes and does")
        wait_until(
            lambda: ghost not in lock_holders(connection), timeout=40, what="the ghost's session ended"
        )
        freed = time.monotonic() - cut
        again = {
            each: wait_until(partial(later_starts, history, each, 1), timeout=60, what="rescued")[0].at - cut
            for each in (careful, common)
        }
        print(  # noqa: T201 - figures for the docs
            f"led after {led:.1f} s, lock freed after {freed:.1f} s, rescued after {max(again.values()):.1f} s"
        )
        assert led < 10.5
        assert freed < 30
        assert max(again.values()) < 35
        lonely.heal()
        wait_until(partial(completed, connection, careful, common), timeout=90, what="completed")
        wait_until(lambda: ends(history)[common] == 2, timeout=60, what="both runs of the other ended")
        assert not overlaps(runs(history, careful, watch.died))
        wait_until(
            lambda: "another migrator leads now" in lonely.running.log or _lost(lonely), what="it stands by"
        )
        assert heir.running.process.poll() is None
    check_end(network, lonely, 302, [careful, common], wait_until)


def _lost(host: Host) -> bool:
    """Whether the host noticed that PostgreSQL was away, and so gave the lead up."""
    return "PostgreSQL is away" in host.running.log


def lock_holders(connection: psycopg.Connection[Any]) -> set[int]:
    """Backends that hold a leader's lock."""
    rows = connection.execute("select pid from pg_locks where locktype = 'advisory' and granted")
    return {row[0] for row in rows}
