"""Which job comes next at the desk."""

from typing import Any

from pmqd import App
from pmqd.arena import Arena
from pmqd.desk import Desk, Finished, Item, Stage
from pmqd.retry import RetryPolicy, release
from tests.unit.test_executor import claimed

app = App()


@app.task(queue="q")
def plain() -> None:
    """Does nothing."""


@app.task(queue="q")
async def waiting() -> None:
    """Does nothing, on the loop."""


class Counter:
    """A desk without runners: jobs are started and ended by hand."""

    def __init__(self, concurrency: int = 1) -> None:
        slot = Arena.create(1, entries=4).slots[0]
        slot.open("worker", "host:i:w0.1")
        self.woken: list[int] = []
        self.dispatched: list[Item] = []
        self.desk = Desk(concurrency, slot, lambda: self.woken.append(1))
        self.desk.dispatch = self.dispatched.append

    def item(self, kind: str = "plain", **changes: Any) -> Item:
        """A claimed job."""
        task = app.registry.find("q", kind)
        assert task is not None
        return Item(claimed(kind, **changes), task, 30.0, RetryPolicy(), 1.0)

    def end(self, item: Item) -> Item | None:
        """Its handler returns."""
        return self.desk.finish(item, Finished(item, release(item.claimed, "w"), 2.0))


def test_urgent_jobs_go_before_those_that_wait_in_the_order_in_which_they_came() -> None:
    """First what runs, then the urgent ones, then the others."""
    counter = Counter()
    first, second, third = (counter.item() for _ in range(3))
    urgent = [counter.item(priority=10) for _ in range(3)]
    counter.desk.hand_over([first, second])
    counter.desk.hand_over([third], urgent[:2])
    counter.desk.hand_over([], urgent[2:])
    [running] = counter.dispatched
    order: list[Item] = []
    following: Item | None = running
    while following is not None:
        order.append(following)
        following = counter.end(following)
    assert order == [first, *urgent, second, third]


def test_a_job_that_follows_in_a_place_is_started_and_cannot_be_taken_back() -> None:
    """Its start is decided with the end of the job before it."""
    counter = Counter()
    first, second, third = (counter.item() for _ in range(3))
    counter.desk.hand_over([first, second, third])
    assert counter.desk.start(first, 1.5)
    assert counter.end(first) is second
    assert counter.desk.withdraw_all() == [third]
    assert second.stage is Stage.STARTED
    assert counter.desk.start(second, 3.0)
    assert second.started == 3.0
    assert counter.desk.load(3.0).busy == 1


def test_what_another_thread_runs_can_be_taken_back_until_it_starts() -> None:
    """An async job behind a plain one, and the other way round, is only assigned."""
    for kinds in (("plain", "waiting"), ("waiting", "plain")):
        counter = Counter()
        first, second = (counter.item(kind) for kind in kinds)
        counter.desk.hand_over([first, second])
        assert counter.desk.start(first, 1.5)
        assert counter.end(first) is second
        assert counter.desk.withdraw_all() == [second]
        assert not counter.desk.start(second, 3.0)


def test_a_job_that_must_run_alone_is_never_passed_on() -> None:
    """It waits until what has ended is settled."""
    counter = Counter(concurrency=2)
    first, alone = counter.item(), counter.item(alone=True)
    counter.desk.hand_over([first, alone])
    assert counter.desk.start(first, 1.5)
    assert counter.end(first) is None
    counter.desk.collect()
    counter.desk.settled(owed=False)
    assert counter.dispatched == [first, alone]


def test_the_clerk_is_woken_when_half_is_gone_and_when_nothing_waits() -> None:
    """Not for each job in between: it would take the interpreter from the handlers."""
    counter = Counter()
    items = [counter.item() for _ in range(8)]
    counter.desk.hand_over(items)

    def woken_by(item: Item) -> int:
        before = len(counter.woken)
        assert counter.desk.start(item, 1.5)
        counter.end(item)
        return len(counter.woken) - before

    counter.desk.rest(1.0, counter.desk.load(1.0), 8)
    assert [woken_by(item) for item in items[:3]] == [0, 0, 1]
    counter.desk.woken()
    counter.desk.rest(1.0, counter.desk.load(1.0), 8)
    assert [woken_by(item) for item in items[3:7]] == [0, 0, 0, 1]
