"""Fixtures: a store on a database of its own, and the record of a worker that uses it."""

from collections.abc import Iterator

import pytest

from pmqd.arena import Arena
from pmqd.slot import Slot
from tests.store_tools import WORKER, Bench, open_bench


@pytest.fixture
def bench(database: str) -> Iterator[Bench]:
    """A store with a lease on a fresh database."""
    with open_bench(database) as bench:
        yield bench


@pytest.fixture
def slot() -> Slot:
    """A worker's record."""
    slot = Arena.create(1, entries=4).slots[0]
    slot.open("worker", WORKER)
    return slot
