"""A worker's two pops: one of all its lists, one of the high band alone."""

import select
import time
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
import redis

from pmqd import batching
from pmqd.arena import Arena
from pmqd.delivery import Delivery
from pmqd.embedded import RedisServer
from pmqd.hints import Hint
from pmqd.settings import RedisSettings


def made(url: str) -> Delivery:
    """The delivery of a worker that serves queues a and b."""
    slot = Arena.create(1, entries=1).slots[0]
    slot.open("worker", "host:i:w0.1")
    lists = batching.lists(["a", "b"], "bands")
    return Delivery(RedisSettings(url=url), "test", slot, lists, lambda: None)


@pytest.fixture
def delivery(redis_url: str) -> Iterator[Delivery]:
    """On an empty server."""
    delivery = made(redis_url)
    yield delivery
    delivery.close()


@pytest.fixture
def raw(redis_url: str) -> Iterator[Any]:
    """A client that pushes and looks."""
    with redis.Redis.from_url(redis_url) as client:
        yield client


def answers(delivery: Delivery) -> bool:
    """Whether one of the pops is answered within a second."""
    poller = select.poll()
    for descriptor in delivery.filenos():
        poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(1000))


def taken(hints: list[Hint] | None) -> list[int]:
    """The numbers of the jobs that came."""
    return [hint.id.int for hint in hints or []]


def test_the_urgent_pop_takes_the_high_band_alone(delivery: Delivery, raw: Any) -> None:
    """What is normal stays; what is urgent comes, of whichever queue, as soon as it is there."""
    raw.lpush("queue:a", str(UUID(int=1)))
    delivery.ask_urgent(10)
    assert delivery.take_urgent(time.monotonic()) == []
    raw.lpush("queue:b:high", str(UUID(int=2)))
    assert answers(delivery)
    assert taken(delivery.take_urgent(time.monotonic())) == [2]
    assert raw.llen("queue:a") == 1
    assert delivery.filenos() == []


def test_both_pops_stand_side_by_side(delivery: Delivery, raw: Any) -> None:
    """Each has its own connection and its own answer; asking twice changes nothing."""
    now = time.monotonic()
    delivery.ask_urgent(10)
    delivery.ask_urgent(10)
    delivery.ask(10, now)
    assert len(delivery.filenos()) == 2
    raw.lpush("queue:a:low", str(UUID(int=3)))
    assert answers(delivery)
    assert (taken(delivery.take(now)), taken(delivery.take_urgent(now))) == ([3], [])
    raw.lpush("queue:a:high", str(UUID(int=4)))
    assert answers(delivery)
    assert taken(delivery.take_urgent(now)) == [4]


def test_how_long_an_answer_may_take(delivery: Delivery) -> None:
    """Whoever waits for a pop need not wake before its answer, until the answer is overdue; without one it is a second."""
    now = time.monotonic()
    assert delivery.answer_within(now) == 1.0
    delivery.ask(10, now)
    assert delivery.answer_within(now) == pytest.approx(1.5, abs=0.2)
    assert delivery.answer_within(now + 1.0) == pytest.approx(0.5, abs=0.2)


def test_a_stop_gives_back_what_either_pop_had_got(delivery: Delivery, raw: Any) -> None:
    """Nothing that was popped and not taken is lost with a drain."""
    delivery.ask_urgent(10)
    raw.lpush("queue:a:high", str(UUID(int=5)))
    assert answers(delivery)
    delivery.ask(10, time.monotonic())
    raw.lpush("queue:b", str(UUID(int=6)))
    deadline = time.monotonic() + 5
    while raw.llen("queue:b") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (raw.llen("queue:a:high"), raw.llen("queue:b")) == (0, 0)
    delivery.stop()
    assert (raw.llen("queue:a:high"), raw.llen("queue:b")) == (1, 1)
    assert delivery.filenos() == []


def test_a_lost_urgent_pop_is_a_lost_redis(own_redis: RedisServer) -> None:
    """Whichever of the two connections ends first: the worker goes without Redis until it answers again."""
    delivery = made(own_redis.url)
    delivery.ask_urgent(10)
    own_redis.kill()
    assert answers(delivery)
    assert delivery.take_urgent(time.monotonic()) == []
    assert delivery.direct
    delivery.close()
