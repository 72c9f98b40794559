"""The contestants: how each is filled, how its workers are started, and how one sees that all is durably done."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.arena import HERE, TEXT_BYTES, Arena, Failure
from benchmarks.peers.tools import tool
from benchmarks.peers.workers import PmqdWorkers, Programs, Workers
from pmqd import schema
from tests.fix_daemon import free_port

Command = tuple[str, ...]
PROGRAM_SECONDS = 1800.0


@dataclass(frozen=True)
class Contestant:
    """One row of a benchmark.

    Attributes:
        name: as it is named on the command line.
        setup: its workers in words.
        prepare: makes the schema, for idle workers.
        fill: makes the schema and enqueues all jobs.
        workers: makes its workers: 2 processes, with 50 slots each for jobs that sleep.
        produce: enqueues each job at its time; returns with the last one.
        done: a query that is true once all jobs are durably done; "" where the store is not PostgreSQL.
    """

    name: str
    setup: str
    prepare: Callable[[Arena], None]
    fill: Callable[[Arena], None]
    workers: Callable[[Arena], Workers]
    produce: Callable[[Arena], None]
    done: str = ""


def run_program(arena: Arena, *command: str, **more: str) -> None:
    """A program of a peer, to its end.

    Raises:
        Failure: it failed; with the end of what it said.
    """
    done = subprocess.run(
        command,
        cwd=HERE,
        env=arena.environ | more,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=PROGRAM_SECONDS,
    )
    if done.returncode != 0:
        raise Failure(
            f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"
        )


def _calling(module: str, function: str) -> Command:
    # Not as __main__: Celery and Procrastinate name tasks, and find their App, by the module.
    return ("python", "-c", f"import {module}; {module}.{function}()")


def _program(*command: str) -> Callable[[Arena], None]:
    return lambda arena: run_program(arena, tool(command[0]), *command[1:])


def _workers(
    noop: Sequence[Command], sleeping: Sequence[Command] | None = None, **more: str
) -> Callable[[Arena], Workers]:
    def make(arena: Arena) -> Workers:
        commands = sleeping if sleeping is not None and arena.sleep else noop
        found = [[tool(command[0]), *command[1:]] for command in commands]
        return Programs(found, arena.environ | more, arena)

    return make


def _nothing(_arena: Arena) -> None:
    """There is no schema."""


def fill_pmqd(
    arena: Arena, kind: str = "job", *, first: int = 0, priority: int = 100, queues: int = 1
) -> None:
    """All jobs, or those from a number on, by one plain insert, evenly over so many queues."""
    prepare_pmqd(arena)
    with arena.connect() as connection:
        connection.execute(
            "insert into pmqd.jobs (queue_name, kind, priority, payload)"
            " select (%s::text[])[1 + n %% %s], %s, %s, jsonb_build_object('number', n, 'text', repeat('x', %s))"
            " from generate_series(%s::int, %s::int) n",
            (queue_names(queues), queues, kind, priority, TEXT_BYTES, first, arena.jobs - 1),
        )


def queue_names(count: int) -> list[str]:
    """So many queues."""
    return ["bench", *(f"bench-{number}" for number in range(1, count))]


def prepare_pmqd(arena: Arena) -> None:
    """The schema."""
    schema.apply(arena.dsn, schema="pmqd")


def produce_pmqd(arena: Arena, function: str = "produce", **more: str) -> None:
    """One of the producers in pmqd_jobs.py, in a process of its own."""
    module = "benchmarks.peers.pmqd_jobs"
    stores = {"PMQD_POSTGRES__DSN": arena.dsn, "PMQD_REDIS__URL": arena.redis.url}
    run_program(arena, sys.executable, "-c", f"import {module} as jobs; jobs.{function}()", **stores, **more)


def pmqd(
    name: str = "pmqd",
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    kind: str = "job",
    producer: str = "produce",
    queues: int = 1,
    whole: bool = False,
    setup: str = "2 processes, all by default; concurrency 50 for jobs that sleep",
) -> Contestant:
    """pmqd, as it is or with some settings, and jobs in so many queues."""
    pool = {"workers": {"queues": queue_names(queues)}} if queues > 1 else {}
    return Contestant(
        name,
        setup,
        prepare_pmqd,
        lambda arena: fill_pmqd(arena, kind, queues=queues),
        lambda arena: PmqdWorkers(arena, {**(settings or {}), **pool}, whole=whole),
        lambda arena: produce_pmqd(arena, producer),
        "select not exists (select from pmqd.claims)",
    )


def without_redis(name: str) -> Contestant:
    """The same with a Redis that was never there."""
    plain = pmqd(name)
    return Contestant(
        name,
        "the same without Redis from the start: claimed straight from PostgreSQL",
        plain.prepare,
        plain.fill,
        lambda arena: PmqdWorkers(arena, {"redis": {"url": f"redis://127.0.0.1:{free_port()}/0"}}),
        plain.produce,
        plain.done,
    )


def wait(predicate: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not predicate():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def _celery(*pool: str, name: str) -> Command:
    return ("celery", "-A", "celery_jobs", "worker", *pool, "-l", "warning", "-n", f"{name}@%h")


_THREADS = ("-P", "threads", "-c", "50")
_PROCRASTINATE = ("procrastinate", "--app=procrastinate_jobs.app", "worker", "--delete-jobs=never", "-c")
FULL = {"redis": {"item": "full", "job_status": "all"}}
FIELD = {
    each.name: each
    for each in (
        pmqd(),
        pmqd("pmqd-host", whole=True),
        pmqd("pmqd-full", FULL, setup='the same with redis.item = "full" and redis.job_status = "all"'),
        without_redis("pmqd-direct"),
        pmqd(
            "pmqd-bypass",
            producer="produce_bypass",
            setup="the same; enqueued by the client in the high band",
        ),
        pmqd("pmqd-async", kind="job-async", setup="the same with handlers that are coroutines"),
        Contestant(
            "graphile-worker",
            "2 Node processes, concurrency 24 (50 for jobs that sleep), localQueue.size 500, completeJobBatchDelay 0",
            _program("node", "graphile_jobs.mjs", "prepare"),
            _program("node", "graphile_jobs.mjs", "fill"),
            _workers([("node", "graphile_jobs.mjs", "work")] * 2, GRAPHILE_TUNED="1"),
            _program("node", "graphile_jobs.mjs", "produce"),
            "select not exists (select from graphile_worker._private_jobs)",
        ),
        Contestant(
            "pgqueuer",
            "2 processes on uvloop, batch_size 100 (jobs that sleep: 25, max_concurrent_tasks 50)",
            _program(*_calling("pgqueuer_jobs", "prepare")),
            _program(*_calling("pgqueuer_jobs", "fill")),
            _workers([_calling("pgqueuer_jobs", "work")] * 2),
            _program(*_calling("pgqueuer_jobs", "produce")),
            "select not exists (select from pgqueuer)",
        ),
        Contestant(
            "celery",
            "prefork -c 2, prefetch 4, early acknowledgement, no results (jobs that sleep: 2 x threads -c 50)",
            _nothing,
            _program(*_calling("celery_jobs", "fill")),
            _workers(
                [_celery("-P", "prefork", "-c", "2", name="a")],
                [_celery(*_THREADS, name="a"), _celery(*_THREADS, name="b")],
            ),
            _program(*_calling("celery_jobs", "produce")),
        ),
        Contestant(
            "dramatiq",
            "-p 2 -t 4 (jobs that sleep: -t 50)",
            _nothing,
            _program(*_calling("dramatiq_jobs", "fill")),
            _workers(
                [("dramatiq", "-p", "2", "-t", "4", "dramatiq_jobs")],
                [("dramatiq", "-p", "2", "-t", "50", "dramatiq_jobs")],
            ),
            _program(*_calling("dramatiq_jobs", "produce")),
        ),
        Contestant(
            "bullmq",
            "2 Node processes, concurrency 50, removeOnComplete",
            _nothing,
            _program("node", "bullmq_jobs.mjs", "fill"),
            _workers([("node", "bullmq_jobs.mjs", "work")] * 2),
            _program("node", "bullmq_jobs.mjs", "produce"),
        ),
        Contestant(
            "procrastinate",
            "2 x worker -c 10 --delete-jobs never (jobs that sleep: -c 50)",
            _program(*_calling("procrastinate_jobs", "prepare")),
            _program(*_calling("procrastinate_jobs", "fill")),
            _workers([(*_PROCRASTINATE, "10")] * 2, [(*_PROCRASTINATE, "50")] * 2),
            _program(*_calling("procrastinate_jobs", "produce")),
            "select not exists (select from procrastinate_jobs where status in ('todo', 'doing'))",
        ),
    )
}
