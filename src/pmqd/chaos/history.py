"""What a chaos run records outside both stores: one line a record, one `write` a line, in files that only grow.

    handlers     S|E job attempt token pid mono_ns wall_us [end]     user code starts, ends
    producers-N  ? job mono_ns kind queue max_attempts priority run_at_us     about to be enqueued
                 h job mono_ns     its hint may be pushed by the client itself, past all that waits for the migrator
                 + job mono_ns     acknowledged;  - job mono_ns     refused;  neither: nobody knows
                 c|C job mono_ns     a cancel asked for, done;  r|R job mono_ns     a replay
    deaths       D pid mono_ns host kind     a process is gone
    nemesis      JSON: at, fault, phase (begin, end), target, hit, window, detail
    drained      the number of the last transition when the wait for all jobs to end was over

`write` on a descriptor with O_APPEND puts a line whole behind what is there, whoever else writes, and what was
written survives the death of the process. Times are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

import os
import time
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql

from pmqd.job import Job

ENVIRONMENT: Final = "PMQD_CHAOS_HISTORY"
"""The variable that names the folder of the history."""
HANDLERS: Final = "handlers"
PRODUCERS: Final = "producers"
DEATHS: Final = "deaths"
NEMESIS: Final = "nemesis"
DRAINED: Final = "drained"

INSERT_EFFECT: Final[LiteralString] = "insert into pmqd_chaos.effects (job_id, token) values (%s, %s)"

_mono_ns = time.monotonic_ns
_time_ns = time.time_ns
_write = os.write
_handlers: tuple[int, int] | None = None  # pid, descriptor


def install(connection: psycopg.Connection[Any], schema: str) -> None:
    """Makes the schema `pmqd_chaos` and the triggers on the table of jobs.

    Args:
        connection: in autocommit mode, of somebody who may.
        schema: pmqd's own.
    """
    text = (files("pmqd.chaos") / "transitions.sql").read_text()
    with connection.transaction():
        connection.execute(sql.SQL(text).format(schema=sql.Identifier(schema)))


def open_file(path: Path) -> int:
    """A descriptor whose writes go behind whatever is in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)


# --- handlers ------------------------------------------------------------------------------------------------


def start(job: Job) -> None:
    """Records that user code of an attempt starts."""
    line = (
        f"S {job.id} {job.attempt_count} {job.claim_token} {os.getpid()} {_mono_ns()} {_time_ns() // 1000}\n"
    )
    _write(_descriptor(), line.encode())


def end(job: Job, how: str) -> None:
    """Records that it ends: ok, retry, snooze, fail, timeout, cancelled, error, kept."""
    line = f"E {job.id} {job.attempt_count} {job.claim_token} {os.getpid()} {_mono_ns()} {_time_ns() // 1000} {how}\n"
    _write(_descriptor(), line.encode())


def _descriptor() -> int:
    """This process's descriptor; without the variable (an application imported by hand) the lines go nowhere."""
    global _handlers  # noqa: PLW0603 - one descriptor per process
    if _handlers is None or _handlers[0] != os.getpid():
        folder = os.environ.get(ENVIRONMENT)
        _handlers = (os.getpid(), open_file(Path(folder, HANDLERS) if folder else Path(os.devnull)))
    return _handlers[1]


# --- producers -----------------------------------------------------------------------------------------------


class ProducerLog:
    """The file of one producer."""

    def __init__(self, folder: Path, number: int) -> None:
        """Opens `producers-NUMBER` in the folder of the history."""
        self._descriptor = open_file(folder / f"{PRODUCERS}-{number}")

    def attempt(self, jobs: Iterable[tuple[object, str, str, int, int, int]]) -> None:
        """Records, before the attempt, what is to be enqueued: id, kind, queue, max_attempts, priority, run_at in µs since 1970 (0: now)."""
        now = _mono_ns()
        self._say(
            f"? {job_id} {now} {kind} {queue} {attempts} {priority} {run_at}"
            for job_id, kind, queue, attempts, priority, run_at in jobs
        )

    def note(self, mark: str, ids: Iterable[object]) -> None:
        """Records an answer: `+`, `-`; a request and its answer: `c`, `C`, `r`, `R`; or, before the attempt, `h`."""
        now = _mono_ns()
        self._say(f"{mark} {job_id} {now}" for job_id in ids)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def _say(self, lines: Iterable[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        if text:
            _write(self._descriptor, text.encode())


# --- the run -------------------------------------------------------------------------------------------------


def drained(folder: Path, connection: psycopg.Connection[Any]) -> None:
    """Records that the wait for the end of all jobs is over: what moves later moves because it is stopped."""
    row = connection.execute(
        "select coalesce(pg_sequence_last_value(pg_get_serial_sequence('pmqd_chaos.transitions', 'seq')), 0)"
    ).fetchone()
    assert row is not None
    (folder / DRAINED).write_text(f"{row[0]}\n")
