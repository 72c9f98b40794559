"""What an application handles: tasks by kind, handlers by queue, what runs when a worker starts and stops."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import update_wrapper
from typing import Any, Final, NotRequired, Protocol
from uuid import UUID

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation
from typing_extensions import TypedDict  # pydantic's own dependency, and what it needs before Python 3.12

from pmqd import codec
from pmqd.errors import EnqueueError, RegistrationError, shown
from pmqd.job import (
    MAX_ATTEMPTS_LIMIT,
    MAX_KIND_LENGTH,
    MAX_PAYLOAD_BYTES,
    TOO_LARGE,
    Claimed,
    Job,
    JobPort,
    band_of,
    is_queue_name,
)
from pmqd.retry import PayloadError, RetryPolicy

OPTIONS: Final = ("conn", "priority", "run_at", "max_attempts", "tags", "id", "_options")
"""Names that `enqueue` and the rows of `enqueue_many` take for themselves, so no parameter may have them."""

Hook = Callable[[], Any]
_KINDS = inspect.Parameter


class Producer(Protocol):
    """What a task enqueues through: the application."""

    def enqueue_task(
        self, task: Task, arguments: Mapping[str, Any], conn: Any, options: Mapping[str, Any]
    ) -> UUID:
        """Enqueues one job of the task."""

    async def enqueue_task_async(
        self, task: Task, arguments: Mapping[str, Any], conn: Any, options: Mapping[str, Any]
    ) -> UUID:
        """The same on an event loop."""

    def enqueue_task_many(self, task: Task, rows: Iterable[Mapping[str, Any]], conn: Any) -> list[UUID]:
        """Enqueues many jobs of the task."""

    async def enqueue_task_many_async(
        self, task: Task, rows: Iterable[Mapping[str, Any]], conn: Any
    ) -> list[UUID]:
        """The same on an event loop."""


@dataclass(eq=False)
class Task:
    """A function that jobs run. Called like the function itself, it runs here and now, without any job."""

    name: str | None  # the kind; None: a handler of a whole queue
    queue: str
    function: Callable[..., Any]
    producer: Producer = field(repr=False)
    max_attempts: int | None = None
    timeout: float | None = None  # seconds
    retry: RetryPolicy | None = None
    priority: int | None = None
    is_async: bool = field(init=False)

    def __post_init__(self) -> None:
        """Checks what was registered; nothing is left to be found out by the first job."""
        _check_numbers(self)
        self.is_async = inspect.iscoroutinefunction(self.function)
        self._job_parameter, parameters = _parameters(self)
        if self.name is None and parameters:
            raise _refused(
                self, f"parameter {next(iter(parameters))}: a handler takes the job alone (job: Job)"
            )
        self._parameters = tuple(parameters)
        # The adapter's own methods do the same and take twice as long.
        validator = _adapter(self, parameters).validator
        self._validate, self._read = validator.validate_python, validator.validate_json
        update_wrapper(self, self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the function here and now."""
        return self.function(*args, **kwargs)

    def arguments(self, **given: Any) -> bytes:
        """Checks arguments against the function's signature.

        Args:
            given: The arguments by name.

        Returns:
            The payload: JSON text.

        Raises:
            EnqueueError: Names the parameter, the value and what is wrong with it.
        """
        return self.payload_of(given)

    def payload_of(self, given: Mapping[str, Any]) -> bytes:
        """Checks a mapping of arguments; as `arguments`."""
        if codec.is_surely_longer(given, MAX_PAYLOAD_BYTES):
            raise EnqueueError(f"{self._label}: {TOO_LARGE}")
        try:
            return codec.dumps(self._validate(given))
        except ValidationError as error:
            raise EnqueueError(f"{self._label}: {self._faults(error)}") from None
        except (TypeError, ValueError) as error:
            raise EnqueueError(f"{self._label}: {str(error).removeprefix('$.')}") from None

    def bind(self, claimed: Claimed, worker_id: str, port: JobPort) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments to call the function with, as its annotations say.

        Args:
            claimed: The row; its payload holds the arguments.
            worker_id: Who runs it.
            port: What its `Job` speaks through, where the function takes one.

        Raises:
            PayloadError: The payload does not fit the signature, or cannot be read.
        """
        if self.name is None:
            job = Job(claimed, _loaded(claimed.payload), worker_id, port)
            return () if self._job_parameter is None else (job,), {}
        try:
            kwargs = self._read(claimed.payload)
        except ValidationError:
            kwargs = self._read_in_steps(claimed.payload)
        if self._job_parameter is not None:
            kwargs[self._job_parameter] = Job(claimed, _loaded(claimed.payload), worker_id, port)
        return (), kwargs

    def _read_in_steps(self, text: str) -> dict[str, Any]:
        """What cannot be read in one: whose fault it is, or that JSON's reader has limits which Python's has not."""
        payload = _loaded(text)
        if not isinstance(payload, dict):
            raise PayloadError(f"{self._label}: the payload is no JSON object: {shown(payload)}")
        try:
            return dict(self._validate(payload))
        except ValidationError as error:
            raise PayloadError(f"{self._label}: {self._faults(error)}") from None

    def enqueue(
        self,
        *,
        conn: Any = None,
        priority: int | None = None,
        run_at: datetime | timedelta | None = None,
        max_attempts: int | None = None,
        tags: Iterable[str] = (),
        id: UUID | None = None,  # noqa: A002 - the option's name, as in SQL
        **arguments: Any,
    ) -> UUID:
        """Enqueues a job.

        Args:
            conn: The caller's connection: the job exists once its transaction commits. None: an own connection.
            priority: 1 to 32767, lower runs first. None: the task's, else the queue's, else 100.
            run_at: Not before this time (aware), or so long after now on the database's clock.
            max_attempts: None: the task's, else the queue's, else 3.
            tags: Texts to find the job by.
            id: The job's id; with an id that exists already nothing happens.
            arguments: The function's arguments.

        Returns:
            The job's id.

        Raises:
            EnqueueError: An argument or option does not fit; nothing was written.
            StoreUnavailable: PostgreSQL did not answer (own connection only).
        """
        options = _options(priority, run_at, max_attempts, tags, id)
        return self.producer.enqueue_task(self, arguments, conn, options)

    async def enqueue_async(
        self,
        *,
        conn: Any = None,
        priority: int | None = None,
        run_at: datetime | timedelta | None = None,
        max_attempts: int | None = None,
        tags: Iterable[str] = (),
        id: UUID | None = None,  # noqa: A002 - the option's name, as in SQL
        **arguments: Any,
    ) -> UUID:
        """Enqueues a job from an event loop; as `enqueue`, with an asynchronous connection as `conn`."""
        options = _options(priority, run_at, max_attempts, tags, id)
        return await self.producer.enqueue_task_async(self, arguments, conn, options)

    def enqueue_many(self, rows: Iterable[Mapping[str, Any]], conn: Any = None) -> list[UUID]:
        """Enqueues many jobs at once: all, or none.

        Args:
            rows: Arguments by name; options of a row stand under "_options" (priority, run_at, max_attempts,
                tags, id).
            conn: As with `enqueue`.

        Returns:
            The ids, in the order of the rows.

        Raises:
            EnqueueError: Names the row, the parameter and the value; nothing was written.
            StoreUnavailable: PostgreSQL did not answer (own connection only).
        """
        return self.producer.enqueue_task_many(self, rows, conn)

    async def enqueue_many_async(self, rows: Iterable[Mapping[str, Any]], conn: Any = None) -> list[UUID]:
        """Enqueues many jobs from an event loop; as `enqueue_many`, with an asynchronous connection."""
        return await self.producer.enqueue_task_many_async(self, rows, conn)

    @property
    def _label(self) -> str:
        return self.name or f"the handler of {self.queue}"

    def _faults(self, error: ValidationError) -> str:
        return "; ".join(self._fault(fault) for fault in error.errors(include_url=False)[:5])

    def _fault(self, fault: Any) -> str:
        name = ".".join(str(part) for part in fault["loc"])
        match fault["type"]:
            case "missing":
                return f"{name} is missing"
            case "extra_forbidden":
                known = ", ".join(self._parameters) or "it has none"
                return f"{name}={shown(fault['input'])} is not allowed: no parameter of that name ({known})"
        return f"{name}={shown(fault['input'])} is not allowed: {fault['msg']}"


@dataclass(eq=False)
class Registry:
    """All that an application handles."""

    tasks: dict[str, Task] = field(default_factory=dict)
    handlers: dict[str, Task] = field(default_factory=dict)
    start_hooks: list[Hook] = field(default_factory=list)
    stop_hooks: list[Hook] = field(default_factory=list)

    def add(self, task: Task) -> None:
        """Adds a task or a handler.

        Raises:
            RegistrationError: Its kind, or its queue's handler, exists already.
        """
        if task.name is None:
            if task.queue in self.handlers:
                raise _refused(
                    task, f"queue {task.queue} has a handler already: {_place(self.handlers[task.queue])}"
                )
            self.handlers[task.queue] = task
        else:
            if task.name in self.tasks:
                raise _refused(task, f"the name {task.name!r} is taken by {_place(self.tasks[task.name])}")
            self.tasks[task.name] = task

    def queues(self) -> list[str]:
        """The queues that are handled here, each once, in the order of registration."""
        return list(dict.fromkeys(task.queue for task in (*self.tasks.values(), *self.handlers.values())))

    def kinds(self) -> list[str]:
        """The kinds that are known here."""
        return list(self.tasks)

    def find(self, queue_name: str, kind: str | None) -> Task | None:
        """What runs a job: the task of its kind, whatever the queue; without a kind the queue's handler."""
        return self.handlers.get(queue_name) if kind is None else self.tasks.get(kind)


def _options(
    priority: int | None,
    run_at: datetime | timedelta | None,
    max_attempts: int | None,
    tags: Iterable[str],
    job_id: UUID | None,
) -> dict[str, Any]:
    return {"priority": priority, "run_at": run_at, "max_attempts": max_attempts, "tags": tags, "id": job_id}


def _check_numbers(task: Task) -> None:
    if not is_queue_name(task.queue):
        raise _refused(
            task, f"queue={task.queue!r}: 1 to 100 letters, digits and _ . : -, not ending in :high or :low"
        )
    if task.name is not None and not (0 < len(task.name) <= MAX_KIND_LENGTH and "\0" not in task.name):
        raise _refused(task, f"name={task.name!r}: 1 to {MAX_KIND_LENGTH} characters without NUL")
    if task.max_attempts is not None and not 1 <= task.max_attempts <= MAX_ATTEMPTS_LIMIT:
        raise _refused(task, f"max_attempts={task.max_attempts!r}: 1 to {MAX_ATTEMPTS_LIMIT}")
    if task.timeout is not None and not (task.timeout > 0 and math.isfinite(task.timeout)):
        raise _refused(task, f"timeout={task.timeout!r}: a number of seconds above 0")
    if task.priority is not None:
        try:
            band_of(task.priority)
        except ValueError as error:
            raise _refused(task, str(error)) from None


def _parameters(task: Task) -> tuple[str | None, dict[str, inspect.Parameter]]:
    """The name of the parameter that takes the job, and the others, with their annotations resolved."""
    function = task.function
    if (
        not callable(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    ):
        raise _refused(task, "a plain or async function is needed, not a generator or a value")
    job_parameter = None
    others = {}
    hints = _hints(task)
    for name, parameter in inspect.signature(function).parameters.items():
        annotation = hints.get(name, Any)
        if annotation is Job or (name == "job" and name not in hints):
            job_parameter = name
        elif parameter.kind in {_KINDS.VAR_POSITIONAL, _KINDS.POSITIONAL_ONLY}:
            raise _refused(
                task, f"parameter {name}: arguments are passed by name, so it cannot be positional"
            )
        elif name in OPTIONS:
            raise _refused(
                task, f"parameter {name} has the name of an option of enqueue ({', '.join(OPTIONS)})"
            )
        else:
            others[name] = parameter.replace(annotation=annotation)
    return job_parameter, others


def _hints(task: Task) -> dict[str, Any]:
    function = inspect.unwrap(task.function)
    # A module that imports Job only for its type checker is common, so the name is known here in any case.
    known = {"Job": Job, **getattr(function, "__globals__", {})}
    try:
        return typing.get_type_hints(function, globalns=known, include_extras=True)
    except NameError as error:
        raise _refused(
            task, f"an annotation cannot be resolved: {error}; import it for the run time too"
        ) from None


def _adapter(task: Task, parameters: dict[str, inspect.Parameter]) -> TypeAdapter[Any]:
    """Checks a mapping of arguments. What is left out stays out: the function's own default fills it in."""
    fields: dict[str, Any] = {}
    others_allowed = False
    for name, parameter in parameters.items():
        if parameter.kind is _KINDS.VAR_KEYWORD:
            others_allowed = True
        else:
            needed = parameter.default is _KINDS.empty
            fields[name] = parameter.annotation if needed else NotRequired[parameter.annotation]
    make: Any = TypedDict  # made from a dictionary that no type checker sees
    shape = make("shape", fields)
    shape.__pydantic_config__ = ConfigDict(extra="allow" if others_allowed else "forbid")
    try:
        return TypeAdapter(shape)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation) as error:
        raise _refused(
            task, f"a parameter's type cannot come from JSON: {str(error).splitlines()[0]}"
        ) from None


def _loaded(text: str) -> Any:
    try:
        return codec.loads(text)
    except ValueError as error:
        # jsonb holds what Python does not read: numbers of 5,000 digits, deep nesting
        raise PayloadError(f"the payload cannot be read: {error}") from None


def _refused(task: Task, reason: str) -> RegistrationError:
    return RegistrationError(f"{_place(task)}: {reason}")


def _place(task: Task) -> str:
    function = task.function
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', repr(function))}"
