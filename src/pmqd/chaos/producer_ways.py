"""The ways in which a chaos run's producers enqueue, and what each of them knows afterwards.

Three answers exist: acknowledged, refused, and none. The last is no accident here but the point: wires are cut at the
COMMIT. What pmqd's client does then (the same rows again, by their ids) is done; a raw insert without such a second
try stays unknown, and the checker allows it zero rows or one.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import sql

from pmqd.chaos.application import app
from pmqd.chaos.history import ProducerLog
from pmqd.chaos.producer_mix import Wish
from pmqd.config import PostgresSettings, RedisSettings, Settings
from pmqd.errors import StoreUnavailable
from pmqd.job import BAND_RANGES
from pmqd.rows import IdMaker

_TRIES: Final = 6
_PAUSE_SECONDS: Final = 0.3
_FATAL: Final = ("08", "57P", "58", "XX")
"""SQLSTATE classes after which nobody knows: the session ended, whatever became of the statement."""


@dataclass(frozen=True, slots=True)
class _Spec:
    """A job as `copy_many` takes it."""

    queue_name: str
    payload: Any
    kind: str | None
    priority: int | None
    run_at: datetime | timedelta | None
    max_attempts: int | None
    tags: Sequence[str]
    id: UUID | None


class Ways:
    """All ways to enqueue, over one wire, with one log. Each gives the ids that were acknowledged."""

    def __init__(
        self, log: ProducerLog, random: Random, dsn: str, schema: str, redis: tuple[str, str]
    ) -> None:
        """Takes the log, the dice, PostgreSQL over the wire, pmqd's schema, and Redis' URL and prefix."""
        self._log = log
        self._random = random
        self._dsn = dsn
        self._schema = schema
        self._ids = IdMaker()
        self._runner = asyncio.Runner()
        self._connection: psycopg.Connection[Any] | None = None
        self.settings = Settings(
            postgres=PostgresSettings.model_validate({"dsn": dsn, "schema": schema}),
            redis=RedisSettings(url=redis[0], prefix=redis[1]),
        )
        app.use(self.settings)

    def close(self) -> None:
        """Closes what was opened."""
        self._drop()
        self._runner.close()
        app.close()

    # pmqd's client, its own connection

    def client(self, wish: Wish) -> list[UUID]:
        """`enqueue` with an id of ours, and again with the same id until it is answered or patience ends."""
        [job_id] = self._ids.make(1)
        run_at = self._attempt([(job_id, wish)])[0]
        for _ in range(_TRIES):
            with contextlib.suppress(StoreUnavailable, psycopg.Error):
                app.enqueue(
                    wish.queue,
                    _payload(wish),
                    kind=wish.kind,
                    priority=wish.priority,
                    run_at=run_at,
                    max_attempts=wish.max_attempts,
                    tags=["chaos:client"],
                    id=job_id,
                )
                return self._acknowledged([job_id])
            time.sleep(_PAUSE_SECONDS)
        return []

    def client_async(self, wishes: Sequence[Wish]) -> list[UUID]:
        """The asynchronous client, several at once; each is tried once (the client itself repeats it)."""
        ids = self._ids.make(len(wishes))
        times = self._attempt(list(zip(ids, wishes, strict=True)))
        return self._acknowledged(self._runner.run(self._gather(list(zip(ids, wishes, times, strict=True)))))

    async def _gather(self, jobs: list[tuple[UUID, Wish, datetime | timedelta | None]]) -> list[UUID]:
        async def one(job_id: UUID, wish: Wish, run_at: datetime | timedelta | None) -> UUID:
            return await app.enqueue_async(
                wish.queue,
                _payload(wish),
                kind=wish.kind,
                priority=wish.priority,
                run_at=run_at,
                max_attempts=wish.max_attempts,
                id=job_id,
            )

        answers = await asyncio.gather(*(one(*job) for job in jobs), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, StoreUnavailable | psycopg.Error):
                raise answer
        return [answer for answer in answers if isinstance(answer, UUID)]

    # many, in the caller's transaction

    def copy(self, wishes: Sequence[Wish]) -> list[UUID]:
        """COPY in a transaction of ours. Its ids are known before the commit, so a lost commit can be asked for again by them."""
        times = [_run_at(wish, self._random) for wish in wishes]
        specs = [_spec(wish, run_at) for wish, run_at in zip(wishes, times, strict=True)]
        connection = self._connected()
        if connection is None:
            return []
        try:
            ids = app.copy_many(specs, conn=connection)
        except psycopg.Error:
            self._drop()
            return []
        self._note(list(zip(ids, wishes, times, strict=True)))
        try:
            connection.commit()
        except psycopg.Error as error:
            self._drop()
            return self._after(error, ids, wishes, times)
        return self._acknowledged(ids)

    def _after(
        self,
        error: psycopg.Error,
        ids: list[UUID],
        wishes: Sequence[Wish],
        times: list[datetime | timedelta | None],
    ) -> list[UUID]:
        """A commit that failed: refused, or unknown; then half of them are written again, with their ids."""
        if not _unknown(error):
            self._log.note("-", ids)
            return []
        if self._random.random() < 0.5:
            return []
        specs = [_spec(wish, run_at, job_id) for job_id, wish, run_at in zip(ids, wishes, times, strict=True)]
        self._note_hints(list(zip(ids, wishes, times, strict=True)))
        for _ in range(_TRIES):
            with contextlib.suppress(StoreUnavailable, psycopg.Error):
                app.copy_many(specs)
                return self._acknowledged(ids)
            time.sleep(_PAUSE_SECONDS)
        return []

    # SQL as any language writes it

    def insert(self, wish: Wish) -> list[UUID]:
        """A plain insert. If its answer is lost, it stays unknown: nobody asks again."""
        statement = sql.SQL(
            "insert into {} (id, queue_name, kind, payload, priority, max_attempts, run_at)"
            " values (%s, %s, %s, %s::jsonb, %s, %s, coalesce(%s, now()))"
        ).format(sql.Identifier(self._schema, "jobs"))
        return self._raw(statement, wish, again=False)

    def function(self, wish: Wish) -> list[UUID]:
        """The SQL function; it may be repeated with its id, and half of the unknown ones are."""
        statement = sql.SQL(
            "select {}(id => %s, queue_name => %s, kind => %s, payload => %s::jsonb, priority => %s, max_attempts => %s,"
            " run_at => %s)"
        ).format(sql.Identifier(self._schema, "enqueue"))
        return self._raw(statement, wish, again=self._random.random() < 0.5)

    def _raw(self, statement: sql.Composed, wish: Wish, *, again: bool) -> list[UUID]:
        connection = self._connected()
        if connection is None:
            return []
        [job_id] = self._ids.make(1)
        run_at = _run_at(wish, self._random, absolute=True)
        self._note([(job_id, wish, run_at)])
        payload = json.dumps(_payload(wish))
        given = (job_id, wish.queue, wish.kind, payload, wish.priority, wish.max_attempts, run_at)
        for _ in range(_TRIES if again else 1):
            try:
                with self._ready() as connection:
                    connection.execute(statement, given)
                    connection.commit()
            except psycopg.Error as error:
                self._drop()
                if not _unknown(error):
                    if not again:  # an earlier try may have come through
                        self._log.note("-", [job_id])
                    return []
                time.sleep(_PAUSE_SECONDS if again else 0)
            else:
                return self._acknowledged([job_id])
        return []

    # what they share

    @contextlib.contextmanager
    def _ready(self) -> Iterator[psycopg.Connection[Any]]:
        connection = self._connected()
        if connection is None:
            raise psycopg.OperationalError("PostgreSQL is away")
        yield connection

    def _connected(self) -> psycopg.Connection[Any] | None:
        """The connection, made if there is none; None while PostgreSQL is away."""
        if self._connection is None or self._connection.closed:
            try:
                self._connection = psycopg.connect(self._dsn, connect_timeout=2, tcp_user_timeout=3000)
            except psycopg.Error:
                time.sleep(_PAUSE_SECONDS)
                return None
        return self._connection

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                connection.close()

    def _attempt(self, jobs: list[tuple[UUID, Wish]]) -> list[datetime | timedelta | None]:
        times = [_run_at(wish, self._random) for _, wish in jobs]
        noted = [(job_id, wish, run_at) for (job_id, wish), run_at in zip(jobs, times, strict=True)]
        self._note(noted)
        self._note_hints(noted)
        return times

    def _note(self, jobs: list[tuple[UUID, Wish, datetime | timedelta | None]]) -> None:
        self._log.attempt(
            (job_id, wish.kind or "-", wish.queue, wish.max_attempts, wish.priority, _microseconds(run_at))
            for job_id, wish, run_at in jobs
        )

    def _note_hints(self, jobs: list[tuple[UUID, Wish, datetime | timedelta | None]]) -> None:
        """Which of them the client tells Redis of, where it commits by itself: those of the high band that are due."""
        highest = BAND_RANGES["high"][1]
        self._log.note(
            "h", [job_id for job_id, wish, run_at in jobs if wish.priority <= highest and run_at is None]
        )

    def _acknowledged(self, ids: list[UUID]) -> list[UUID]:
        self._log.note("+", ids)
        return ids


def _spec(wish: Wish, run_at: datetime | timedelta | None, job_id: UUID | None = None) -> _Spec:
    return _Spec(
        wish.queue,
        _payload(wish),
        wish.kind,
        wish.priority,
        run_at,
        wish.max_attempts,
        ("chaos:copy",),
        job_id,
    )


def _payload(wish: Wish) -> Any:
    if wish.kind == "snoozing":
        return {"until": time.time() + wish.arguments["until"]}
    return wish.arguments


def _run_at(wish: Wish, random: Random, *, absolute: bool = False) -> datetime | timedelta | None:
    """A time of the producer's clock, or a delay that counts on the database's."""
    if not wish.delay_seconds:
        return None
    delay = timedelta(seconds=wish.delay_seconds)
    return datetime.now(UTC) + delay if absolute or random.random() < 0.5 else delay


def _microseconds(run_at: datetime | timedelta | None) -> int:
    """For the history; 0 where the database decides."""
    return int(run_at.timestamp() * 1_000_000) if isinstance(run_at, datetime) else 0


def _unknown(error: psycopg.Error) -> bool:
    """Whether nobody knows what became of the statement: no answer, or the session's end instead of one."""
    state = error.sqlstate
    return state is None or state.startswith(_FATAL)
