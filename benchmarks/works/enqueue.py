"""`enqueue`: pmqd's client beside the bare statements that write the same rows into the same table."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import orjson

from benchmarks.peers.arena import TEXT_BYTES, Arena, private
from benchmarks.peers.field import prepare_pmqd
from benchmarks.works.work import Figures, Scale, Work
from pmqd import App
from pmqd.registry import Task
from pmqd.rows import COPY_COLUMNS, IdMaker, copy_data, row_of
from pmqd.settings import PostgresSettings, Settings

JOBS = 200_000
CHUNK = 10_000
SECONDS = 5.0
CONNECTIONS: Final = (1, 16)
_MANY = "rows/s, many at once"
_WARM = 50

Many = Callable[[Sequence[dict[str, Any]]], object]
Single = Callable[[dict[str, Any]], object]


def measure_pmqd(scale: Scale) -> Figures:
    """`enqueue_many` and `enqueue` with arguments checked, in own transactions."""
    figures: list[tuple[str, float]] = []
    with _table() as arena:
        app = App(Settings(postgres=PostgresSettings(dsn=arena.dsn)))
        task = _task(app)
        figures.append((_MANY, _many(scale, task.enqueue_many)))
        figures += [
            (_single_unit(count), _single(scale, count, lambda: lambda row: task.enqueue(**row)))
            for count in CONNECTIONS
        ]
        app.close()
    return figures


def measure_copy(scale: Scale) -> Figures:
    """COPY as one writes it by hand: the columns that a job needs, its payload dumped in the loop."""
    with _table() as arena, arena.connect() as connection, connection.cursor() as cursor:

        def write(rows: Sequence[dict[str, Any]]) -> None:
            with cursor.copy("copy pmqd.jobs (queue_name, kind, payload) from stdin") as copy:
                for row in rows:
                    copy.write_row(("bench", "job", orjson.dumps(row).decode()))

        return [(_MANY, _many(scale, write))]


def measure_copy_ready(scale: Scale) -> Figures:
    """COPY of data that was made beforehand, the same that pmqd writes."""
    data: list[bytes] = []
    statement = f"copy pmqd.jobs ({', '.join(COPY_COLUMNS)}) from stdin (format binary)"
    with _table() as arena, arena.connect() as connection, connection.cursor() as cursor:

        def make(rows: Sequence[dict[str, Any]]) -> None:
            ids = IdMaker().make(len(rows))
            made = [
                row_of("bench", "job", orjson.dumps(row), {}, job_id)
                for row, job_id in zip(rows, ids, strict=True)
            ]
            now: Any = connection.execute("select now()").fetchone()
            data.append(b"".join(copy_data(made, {}, now[0], "utf-8")))

        def write(_rows: Sequence[dict[str, Any]]) -> None:
            with cursor.copy(statement.encode()) as copy:
                copy.write(data.pop())

        return [(_MANY, _many(scale, write, before=make))]


def measure_insert(scale: Scale) -> Figures:
    """A bare INSERT, prepared by psycopg, each committed by itself."""
    with _table() as arena:
        return [(_single_unit(count), _single(scale, count, lambda: _insert(arena))) for count in CONNECTIONS]


def _task(app: App) -> Task:
    @app.task(queue="bench", name="job")
    def job(number: int, text: str) -> None:
        """Never run."""

    return job


def _insert(arena: Arena) -> Single:
    connection = arena.connect()

    def insert(row: dict[str, Any]) -> None:
        connection.execute(
            "insert into pmqd.jobs (queue_name, kind, payload) values ('bench', 'job', %s)",
            (orjson.dumps(row).decode(),),
        )

    return insert


@contextmanager
def _table() -> Iterator[Arena]:
    """An empty table, and a migrator that seems awake: inserts need not notify, as under any load."""
    with private(1) as arena:
        prepare_pmqd(arena)
        with arena.connect() as connection:
            connection.execute("update pmqd.leader set awake_until = 'infinity'")
        arena.settled()
        yield arena


def _rows(first: int, count: int) -> list[dict[str, Any]]:
    return [{"number": number, "text": "x" * TEXT_BYTES} for number in range(first, first + count)]


def _many(scale: Scale, write: Many, before: Many | None = None) -> float:
    """Rows per second in chunks, the first of which does not count."""
    jobs, spent = scale.jobs_or(JOBS), 0.0
    for first in range(-CHUNK, jobs, CHUNK):
        rows = _rows(first + CHUNK, CHUNK)
        if before is not None:
            before(rows)
        begun = time.perf_counter()
        write(rows)
        if first >= 0:
            spent += time.perf_counter() - begun
    return len(range(0, jobs, CHUNK)) * CHUNK / spent


def _single_unit(count: int) -> str:
    return f"jobs/s, one at a time on {count} connection{'s' if count > 1 else ''}"


def _single(scale: Scale, count: int, make: Callable[[], Single]) -> float:
    """Jobs per second of so many threads, each on a connection of its own."""
    seconds = scale.seconds_or(SECONDS)
    done = [0] * count
    ready = threading.Barrier(count)

    def produce(which: int) -> None:
        enqueue = make()
        for row in _rows(0, _WARM):
            enqueue(row)
        ready.wait()
        row, until = _rows(which, 1)[0], time.perf_counter() + seconds
        while time.perf_counter() < until:
            enqueue(row)
            done[which] += 1

    threads = [threading.Thread(target=produce, args=(which,)) for which in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / seconds


ENQUEUE = Work(
    "enqueue",
    f"{JOBS:,} rows in chunks of {CHUNK:,}: enqueue_many, raw COPY written by hand (copy), COPY of data made beforehand (copy-ready);"
    f" single jobs for {SECONDS:g} s, each in its own transaction: enqueue, and a bare INSERT (insert)",
    {
        "pmqd": measure_pmqd,
        "copy": measure_copy,
        "copy-ready": measure_copy_ready,
        "insert": measure_insert,
    },
)
