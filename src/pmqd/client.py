"""The application: tasks and handlers are registered here, and jobs are enqueued through it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Protocol, TypeVar
from uuid import UUID

import psycopg

from pmqd import config
from pmqd.bypass import Bypass
from pmqd.config import Settings
from pmqd.connections import (
    AsyncConnections,
    Connections,
    caller_connection,
    caller_connection_async,
    unavailable,
)
from pmqd.errors import EnqueueError
from pmqd.registry import Registry, Task
from pmqd.retry import RetryPolicy
from pmqd.rows import ROW_OPTIONS, IdMaker, Row, payload_of, row_like, row_of, split_options
from pmqd.writing import write, write_async

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ids = IdMaker()
_NIL: Final = UUID(int=0)


class JobSpec(Protocol):
    """A job that `copy_many` writes: any object with these attributes; None is decided by the queue's defaults."""

    @property
    def queue_name(self) -> str:
        """The queue."""

    @property
    def payload(self) -> Any:
        """What has a JSON form."""

    @property
    def kind(self) -> str | None:
        """The task's name."""

    @property
    def priority(self) -> int | None:
        """1 to 32767, lower runs first."""

    @property
    def run_at(self) -> datetime | timedelta | None:
        """Not before."""

    @property
    def max_attempts(self) -> int | None:
        """Attempts."""

    @property
    def tags(self) -> Sequence[str]:
        """Texts to find it by."""

    @property
    def id(self) -> UUID | None:
        """The caller's own id."""


_AWAY: Final = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)
"""PostgreSQL is away, or it is one that may not be written: the standby of another, or one that was just demoted."""


class App:
    """An application of pmqd: what its workers run, and how its jobs are enqueued.

    Settings are read at the first enqueue (from PMQD_* and pmqd.toml), so that a module with an App can be
    imported anywhere. One App serves all threads and event loops of a process, and may be used after a fork.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        """Takes settings for the case that they are not to be read from the environment."""
        self.registry = Registry()
        self._settings = settings
        self._open: _Open | None = None
        self._inherited: list[_Open] = []

    def task(
        self,
        *,
        queue: str,
        name: str | None = None,
        max_attempts: int | None = None,
        timeout: float | None = None,
        retry: RetryPolicy | None = None,
        priority: int | None = None,
    ) -> Callable[[Callable[..., Any]], Task]:
        """Registers a function, plain or async, as a task.

        Args:
            queue: The queue of its jobs.
            name: The kind of its jobs. None: the function's name.
            max_attempts: Of its jobs. None: the queue's, else 3.
            timeout: Seconds that an attempt may run. None: the queue's.
            retry: The delays between attempts. None: the queue's.
            priority: Of its jobs. None: the queue's, else 100.

        Raises:
            RegistrationError: Something of this cannot be; names what.
        """

        def register(function: Callable[..., Any]) -> Task:
            kind = name or getattr(function, "__name__", "")
            task = Task(kind, queue, function, self, max_attempts, timeout, retry, priority)
            self.registry.add(task)
            return task

        return register

    def handler(
        self, queue: str, *, timeout: float | None = None, retry: RetryPolicy | None = None
    ) -> Callable[[Callable[..., Any]], Task]:
        """Registers a function for all jobs of a queue that carry no kind; it takes the job, or nothing.

        Args:
            queue: The queue.
            timeout: Seconds that an attempt may run. None: the queue's.
            retry: The delays between attempts. None: the queue's.

        Raises:
            RegistrationError: Something of this cannot be; names what.
        """

        def register(function: Callable[..., Any]) -> Task:
            task = Task(None, queue, function, self, timeout=timeout, retry=retry)
            self.registry.add(task)
            return task

        return register

    def on_worker_start(self, function: _Function) -> _Function:
        """Registers what every worker process runs before its first job."""
        self.registry.start_hooks.append(function)
        return function

    def on_worker_stop(self, function: _Function) -> _Function:
        """Registers what every worker process runs after its last job."""
        self.registry.stop_hooks.append(function)
        return function

    def enqueue(
        self,
        queue_name: str,
        payload: Any,
        *,
        kind: str | None = None,
        conn: Any = None,
        priority: int | None = None,
        run_at: datetime | timedelta | None = None,
        max_attempts: int | None = None,
        tags: Iterable[str] = (),
        id: UUID | None = None,  # noqa: A002 - the option's name, as in SQL
    ) -> UUID:
        """Enqueues a job by its queue and payload; a task's own `enqueue` checks its arguments as well.

        Args:
            queue_name: The queue.
            payload: What has a JSON form, at most 256 KiB of it.
            kind: The task's name. None: the queue's handler runs it.
            conn: The caller's connection: the job exists once its transaction commits. None: an own connection.
            priority: 1 to 32767, lower runs first. None: the queue's, else 100.
            run_at: Not before this time (aware), or so long after now on the database's clock.
            max_attempts: None: the queue's, else 3.
            tags: Texts to find the job by.
            id: The job's id; with an id that exists already nothing happens.

        Returns:
            The job's id.

        Raises:
            EnqueueError: Something does not fit; nothing was written.
            StoreUnavailable: PostgreSQL did not answer (own connection only).
        """
        options = {
            "priority": priority,
            "run_at": run_at,
            "max_attempts": max_attempts,
            "tags": tags,
            "id": id,
        }
        row = row_of(queue_name, kind, payload_of(payload), options, _new_id(options))
        return self._write([row], conn)[0]

    async def enqueue_async(
        self,
        queue_name: str,
        payload: Any,
        *,
        kind: str | None = None,
        conn: Any = None,
        priority: int | None = None,
        run_at: datetime | timedelta | None = None,
        max_attempts: int | None = None,
        tags: Iterable[str] = (),
        id: UUID | None = None,  # noqa: A002 - the option's name, as in SQL
    ) -> UUID:
        """Enqueues a job from an event loop; as `enqueue`, with an asynchronous connection as `conn`."""
        options = {
            "priority": priority,
            "run_at": run_at,
            "max_attempts": max_attempts,
            "tags": tags,
            "id": id,
        }
        row = row_of(queue_name, kind, payload_of(payload), options, _new_id(options))
        return (await self._write_async([row], conn))[0]

    def copy_many(self, jobs: Iterable[JobSpec], conn: Any = None) -> list[UUID]:
        """Enqueues many jobs of any queues at once: all, or none.

        Args:
            jobs: What to enqueue.
            conn: As with `enqueue`.

        Returns:
            The ids, in the order of the jobs.

        Raises:
            EnqueueError: Names the job by its number, and what does not fit; nothing was written.
            StoreUnavailable: PostgreSQL did not answer (own connection only).
        """
        return self._write(_rows_of_specs(jobs), conn)

    async def copy_many_async(self, jobs: Iterable[JobSpec], conn: Any = None) -> list[UUID]:
        """Enqueues many jobs from an event loop; as `copy_many`, with an asynchronous connection."""
        return await self._write_async(_rows_of_specs(jobs), conn)

    def enqueue_task(
        self, task: Task, arguments: Mapping[str, Any], conn: Any, options: Mapping[str, Any]
    ) -> UUID:
        """What `Task.enqueue` calls."""
        return self._write([_task_row(task, arguments, options)], conn)[0]

    async def enqueue_task_async(
        self, task: Task, arguments: Mapping[str, Any], conn: Any, options: Mapping[str, Any]
    ) -> UUID:
        """What `Task.enqueue_async` calls."""
        return (await self._write_async([_task_row(task, arguments, options)], conn))[0]

    def enqueue_task_many(self, task: Task, rows: Iterable[Mapping[str, Any]], conn: Any) -> list[UUID]:
        """What `Task.enqueue_many` calls."""
        return self._write(_task_rows(task, rows), conn)

    async def enqueue_task_many_async(
        self, task: Task, rows: Iterable[Mapping[str, Any]], conn: Any
    ) -> list[UUID]:
        """What `Task.enqueue_many_async` calls."""
        return await self._write_async(_task_rows(task, rows), conn)

    def use(self, settings: Settings) -> None:
        """Takes the settings of the worker that runs this App, unless it was given its own: no file or variable is read then."""
        self._settings = self._settings or settings

    def close(self) -> None:
        """Closes what was opened for own enqueues; a later enqueue opens it again."""
        opened = self._open
        if opened is not None and opened.pid == os.getpid():
            self._open = None
            opened.connections.close()
            opened.async_connections.close()
            opened.bypass.close()

    def _opened(self) -> _Open:
        """What own enqueues need; made anew after a fork. Two threads may make it at once: the later one counts."""
        opened = self._open
        if opened is None or opened.pid != os.getpid():
            if opened is not None:
                self._inherited.append(opened)  # the parent's: kept alive unused, as closing it ends it there
            self._settings = self._settings or config.producer_settings()
            opened = self._open = _Open.of(self._settings)
        return opened

    def _write(self, rows: list[Row], conn: Any) -> list[UUID]:
        ids = [row.id for row in rows]
        if not rows:
            return ids
        opened = self._opened()
        if conn is not None:
            write(caller_connection(conn), opened.schema, rows)
            return ids
        try:
            with opened.connections.one() as own:
                write(own, opened.schema, rows)
        except _AWAY:
            # Nobody knows whether it was committed. The ids are ours, so writing the same rows again is safe.
            self._write_again(opened, rows)
        opened.bypass.push(rows)
        return ids

    def _write_again(self, opened: _Open, rows: list[Row]) -> None:
        try:
            with opened.connections.one(new=True) as own:
                write(own, opened.schema, rows, repeated=True)
        except _AWAY as error:
            raise _unknown(opened, rows, error) from error

    async def _write_async(self, rows: list[Row], conn: Any) -> list[UUID]:
        ids = [row.id for row in rows]
        if not rows:
            return ids
        opened = self._opened()
        if conn is not None:
            await write_async(await caller_connection_async(conn), opened.schema, rows)
            return ids
        try:
            async with opened.async_connections.one() as own:
                await write_async(own, opened.schema, rows)
        except _AWAY:
            await self._write_again_async(opened, rows)
        if opened.bypass.wanted(rows):
            await asyncio.to_thread(opened.bypass.push, rows)
        return ids

    async def _write_again_async(self, opened: _Open, rows: list[Row]) -> None:
        try:
            async with opened.async_connections.one(new=True) as own:
                await write_async(own, opened.schema, rows, repeated=True)
        except _AWAY as error:
            raise _unknown(opened, rows, error) from error


@dataclass(frozen=True)
class _Open:
    """What an App has once its settings are known."""

    pid: int
    settings: Settings
    schema: str
    connections: Connections
    async_connections: AsyncConnections
    bypass: Bypass

    @classmethod
    def of(cls, settings: Settings) -> _Open:
        postgres = settings.postgres
        return cls(
            pid=os.getpid(),
            settings=settings,
            schema=postgres.schema_name,
            connections=Connections(postgres),
            async_connections=AsyncConnections(postgres),
            bypass=Bypass(settings.redis),
        )


def _new_id(options: Mapping[str, Any]) -> UUID | None:
    return _ids.make(1)[0] if options.get("id") is None else None


def _task_row(task: Task, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Row:
    if task.name is None:
        raise EnqueueError(
            f"the handler of {task.queue} has no arguments: app.enqueue({task.queue!r}, payload)"
        )
    chosen = dict(options)
    for name, value in _defaults(task).items():
        if chosen.get(name) is None:
            chosen[name] = value
    return row_of(task.queue, task.name, task.payload_of(arguments), chosen, _new_id(chosen))


def _task_rows(task: Task, rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """All rows, checked before the first is written."""
    if task.name is None:
        raise EnqueueError(f"the handler of {task.queue} has no arguments: app.copy_many(...)")
    given = list(rows)
    made = []
    defaults = _defaults(task)
    plain = row_of(task.queue, task.name, b"{}", defaults, _NIL)
    for number, (row, new_id) in enumerate(zip(given, _ids.make(len(given)), strict=True), 1):
        try:
            arguments, options = split_options(row, defaults)
            payload = task.payload_of(arguments)
            if options is defaults:
                made.append(row_like(plain, payload, new_id))
            else:
                made.append(row_of(task.queue, task.name, payload, options, new_id))
        except EnqueueError as error:
            raise EnqueueError(f"row {number}: {error}") from None
    return made


def _rows_of_specs(jobs: Iterable[JobSpec]) -> list[Row]:
    given = list(jobs)
    made = []
    for number, (spec, new_id) in enumerate(zip(given, _ids.make(len(given)), strict=True), 1):
        options = {name: getattr(spec, name) for name in ROW_OPTIONS}
        try:
            made.append(row_of(spec.queue_name, spec.kind, payload_of(spec.payload), options, new_id))
        except EnqueueError as error:
            raise EnqueueError(f"job {number}: {error}") from None
    return made


def _defaults(task: Task) -> dict[str, Any]:
    return {"priority": task.priority, "max_attempts": task.max_attempts}


def _unknown(opened: _Open, rows: Sequence[Row], error: Exception) -> Exception:
    lost = unavailable(opened.settings.postgres, error)
    which = f"id={rows[0].id}" if len(rows) == 1 else f"{len(rows)} jobs from id={rows[0].id} on"
    return type(lost)(f"{lost}; whether {which} was accepted is unknown")
