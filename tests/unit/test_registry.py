"""What an application registers: signatures checked at once, arguments at the call, payloads before the handler."""

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any
from uuid import UUID

import pytest
from pydantic import BaseModel, Field

from pmqd.errors import EnqueueError, RegistrationError
from pmqd.job import Job
from pmqd.registry import OPTIONS, Registry, Task
from pmqd.retry import PayloadError
from tests.jobs import NOW, a_claim


class Keeps:
    """A producer that keeps what it is given; its methods are those of `registry.Producer`."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def enqueue_task(
        self, task: Task, arguments: Mapping[str, Any], conn: Any, options: Mapping[str, Any]
    ) -> UUID:
        """Keeps it."""
        self.given.append((task.name, dict(arguments), conn, dict(options)))
        return UUID(int=1)

    async def enqueue_task_async(
        self, task: Task, arguments: Mapping[str, Any], conn: Any, options: Mapping[str, Any]
    ) -> UUID:
        """Keeps it."""
        return self.enqueue_task(task, arguments, conn, options)

    def enqueue_task_many(self, task: Task, rows: Iterable[Mapping[str, Any]], conn: Any) -> list[UUID]:
        """Keeps it."""
        self.given.append((task.name, list(rows), conn))
        return []

    async def enqueue_task_many_async(
        self, task: Task, rows: Iterable[Mapping[str, Any]], conn: Any
    ) -> list[UUID]:
        """Keeps it."""
        return self.enqueue_task_many(task, rows, conn)


def task_of(function: Any, name: str | None = "send", **options: Any) -> Task:
    """A task of the function."""
    return Task(name, options.pop("queue", "mail"), function, Keeps(), **options)


def bound(task: Task, payload: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the function of a job with this payload is called with."""
    return bound_text(task, json.dumps(payload))


def bound_text(task: Task, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same of a payload as it stands in the database."""
    return task.bind(a_claim(payload=text), "w1", port=None)  # type: ignore[arg-type]


class Item(BaseModel):
    """A model as argument."""

    sku: str
    price: Decimal


@dataclass
class Address:
    """A dataclass as argument."""

    street: str


def send(
    job: Job, campaign: UUID, item: Item, to: list[Address], when: datetime | None = None, copy: int = 1
) -> None:
    """A task with everything."""


GOOD: dict[str, Any] = {
    "campaign": UUID(int=7),
    "item": Item(sku="a", price=Decimal("1.10")),
    "to": [Address("Main")],
}


def test_arguments_become_a_payload_and_come_back_as_annotated() -> None:
    """What is given at the call is what the handler gets, in the types of its annotations."""
    task = task_of(send)
    payload = task.arguments(**GOOD, when=NOW)
    args, kwargs = bound_text(task, payload.decode())
    assert args == ()
    assert kwargs.pop("job").id == UUID(int=1)
    assert kwargs == {**GOOD, "when": NOW}


def test_what_is_left_out_stays_out() -> None:
    """Defaults are the function's own at run time, not frozen into the payload."""
    assert b"copy" not in task_of(send).arguments(**GOOD)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"campaign": "x"}, r"send: campaign='x' is not allowed: Input should be a valid UUID"),
        (
            {"campaigns": 1},
            r"send: campaigns=1 is not allowed: no parameter of that name \(campaign, item, to, when, copy\)",
        ),
        ({"copy": "many"}, r"send: copy='many' is not allowed: Input should be a valid integer"),
        ({"item": {"sku": "a"}}, r"send: item.price is missing"),
        ({"to": [Address("x\0")]}, r"send: to\[0\]\.street: a NUL"),
        ({"job": 1}, r"send: job=1 is not allowed: no parameter of that name"),
    ],
)
def test_wrong_arguments_are_errors_at_the_call(change: dict[str, Any], text: str) -> None:
    """The error names the task, the parameter, the value and what is wrong."""
    with pytest.raises(EnqueueError, match=text):
        task_of(send).arguments(**{**GOOD, **change})


def test_a_missing_argument_is_named() -> None:
    """So is an argument that is not there."""
    with pytest.raises(EnqueueError, match="send: campaign is missing; item is missing; to is missing"):
        task_of(send).arguments()


def test_a_long_value_is_shortened() -> None:
    """The error about a megabyte stays a line."""
    with pytest.raises(EnqueueError) as caught:
        task_of(send).arguments(**{**GOOD, "copy": "x" * 10**6})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("payload", [None, [], "text", {"campaign": "no"}, {}, {"x": 1}])
def test_a_payload_that_does_not_fit_is_a_payload_error(payload: object) -> None:
    """Plain SQL can enqueue anything; the handler never sees what does not fit, and no retry is tried."""
    with pytest.raises(PayloadError, match="send: "):
        bound(task_of(send), payload)


def test_a_deeply_nested_payload_is_read() -> None:
    """Deeper than pydantic reads text, not deeper than Python does."""

    def deep(a: Any) -> None: ...

    text = '{"a": ' + "[" * 500 + "]" * 500 + "}"
    assert bound_text(task_of(deep), text) == ((), json.loads(text))
    with pytest.raises(PayloadError, match="the payload cannot be read"):
        bound_text(task_of(deep), '{"a": ' + "[" * 5000 + "]" * 5000 + "}")


def test_what_can_be_more_than_a_text_comes_back_as_what_was_given() -> None:
    """JSON has no dates: a text that is one is one where the annotation allows it."""

    def dated(day: date | str) -> None: ...

    task = task_of(dated)
    for given in (date(2026, 1, 2), "tomorrow"):
        assert bound_text(task, task.arguments(day=given).decode()) == ((), {"day": given})


def test_extra_arguments_where_the_function_takes_them() -> None:
    """A function with **kwargs gets what it is given."""

    def loose(a: int, **others: Any) -> None: ...

    task = task_of(loose)
    assert task.arguments(a=1, b=[2]) == b'{"a":1,"b":[2]}'
    assert bound(task, {"a": 1, "b": [2]}) == ((), {"a": 1, "b": [2]})


def test_limits_in_annotations_are_checked() -> None:
    """`Annotated` with limits works at the call."""

    def limited(n: Annotated[int, Field(ge=1)]) -> None: ...

    with pytest.raises(EnqueueError, match="n=0 is not allowed: Input should be greater than or equal to 1"):
        task_of(limited).arguments(n=0)


@pytest.mark.parametrize("name", [name for name in OPTIONS if not name.startswith("_")])
def test_parameters_named_like_an_option_are_refused(name: str) -> None:
    """`enqueue` could not tell them apart, so registration says so."""
    scope: dict[str, Any] = {}
    exec(f"def bad({name}): ...", scope)  # the parameter's name is the case
    with pytest.raises(RegistrationError, match=f"parameter {name} has the name of an option"):
        task_of(scope["bad"])


def positional(a: int, /) -> None:
    """Cannot be a task."""


def several(*args: int) -> None:
    """Cannot be a task."""


def a_generator() -> Any:
    """Cannot be a task."""
    yield 1


async def an_async_generator() -> Any:
    """Cannot be a task."""
    yield 1


def unknown(a: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821 - the case
    """Cannot be a task."""


class NoJson:
    """Has no JSON form."""


def no_json(a: NoJson) -> None:
    """Cannot be a task."""


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (positional, "parameter a: arguments are passed by name"),
        (several, "parameter args: arguments are passed by name"),
        (a_generator, "not a generator"),
        (an_async_generator, "not a generator"),
        (unknown, "name 'Nowhere' is not defined"),
        (no_json, "a parameter's type cannot come from JSON"),
        (7, "a plain or async function is needed"),
    ],
)
def test_functions_that_cannot_be_tasks(function: Any, text: str) -> None:
    """What would fail with the first job fails at registration, by name."""
    with pytest.raises(RegistrationError, match=text):
        task_of(function)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"queue": "a b"}, "queue='a b'"),
        ({"name": ""}, "name=''"),
        ({"name": "x" * 201}, "name='xxx"),
        ({"max_attempts": 0}, "max_attempts=0: 1 to 1000"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"priority": 32768}, "priority 32768"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], text: str) -> None:
    """A bad option of a task is an error at registration."""
    with pytest.raises(RegistrationError, match=text):
        task_of(send, **options)


def test_the_job_is_found_by_annotation_or_name() -> None:
    """`job: Job` under any name, as text, or plain `job`."""

    def by_text(j: "Job", a: int) -> None: ...

    def by_name(job, a: int) -> None:  # type: ignore[no-untyped-def]
        ...

    for function, name in ((by_text, "j"), (by_name, "job")):
        _, kwargs = bound(task_of(function), {"a": 1})
        assert set(kwargs) == {name, "a"}


def test_an_argument_may_be_called_job() -> None:
    """A parameter `job` of another type is an argument like any other."""

    def about(job: str) -> None: ...

    assert task_of(about).arguments(job="baker") == b'{"job":"baker"}'


def test_async_and_decorated_functions() -> None:
    """Async functions are known as such; a wrapped function shows the signature of what it wraps."""

    async def later(a: int) -> None: ...

    @functools.wraps(send)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        send(*args, **kwargs)

    assert task_of(later).is_async
    assert not task_of(send).is_async
    assert b"campaign" in task_of(wrapped).arguments(**GOOD)


def test_a_task_is_still_its_function() -> None:
    """Called, it runs here; its name and doc are the function's."""

    def double(n: int) -> int:
        """Twice."""
        return 2 * n

    task = task_of(double)
    assert task(4) == 8
    assert task.__doc__ == "Twice."


def test_handlers_take_the_job_or_nothing() -> None:
    """A whole queue's handler gets the payload by its job, whatever the payload is."""

    def inbound(job: Job) -> None: ...

    def nothing() -> None: ...

    def wrong(job: Job, a: int) -> None: ...

    [job], kwargs = bound(task_of(inbound, name=None), [1, "x"])
    assert (job.payload, kwargs) == ([1, "x"], {})
    assert bound(task_of(nothing, name=None), [1, "x"]) == ((), {})
    with pytest.raises(RegistrationError, match="parameter a: a handler takes the job alone"):
        task_of(wrong, name=None)


def test_the_registry_finds_by_kind_and_by_queue() -> None:
    """A kind is found in any queue, a job without one by its queue; queues are listed once, in order."""
    registry = Registry()
    sender, inbound = task_of(send), task_of(lambda job: None, name=None, queue="in")
    other = task_of(send, name="other")
    for task in (sender, inbound, other):
        registry.add(task)
    assert registry.queues() == ["mail", "in"]
    assert registry.kinds() == ["send", "other"]
    assert registry.find("anywhere", "send") is sender
    assert registry.find("in", None) is inbound
    assert registry.find("mail", None) is None
    assert registry.find("in", "unknown") is None


def test_names_are_taken_once() -> None:
    """A second task of a kind, or a second handler of a queue, is refused and names the first."""
    registry = Registry()
    registry.add(task_of(send))
    registry.add(task_of(lambda job: None, name=None))
    with pytest.raises(RegistrationError, match=r"the name 'send' is taken by .*\.send"):
        registry.add(task_of(send))
    with pytest.raises(RegistrationError, match="queue mail has a handler already"):
        registry.add(task_of(lambda job: None, name=None))


def test_enqueue_passes_options_and_arguments_on() -> None:
    """Options and arguments reach the application apart."""
    keeps = Keeps()
    task = Task("send", "mail", send, keeps)
    task.enqueue(a=1, priority=5, conn="c")
    assert keeps.given == [
        ("send", {"a": 1}, "c", {"priority": 5, "run_at": None, "max_attempts": None, "tags": (), "id": None})
    ]
    task.enqueue_many([{"a": 1}], conn="c")
    assert keeps.given[-1] == ("send", [{"a": 1}], "c")
