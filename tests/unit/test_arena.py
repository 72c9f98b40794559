"""The shared mapping: what one process writes the others read, and half-written records are passed over."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from uuid import UUID, uuid4

import pytest

from pmqd.arena import Arena, Kind, Reason, State


@pytest.fixture
def arena() -> Iterator[Arena]:
    """A small arena whose bells are closed again."""
    made = Arena.create(slots=4, entries=3, tokens=2)
    yield made
    for bell in made.bells:
        os.close(bell)


@dataclass
class Pulse:
    """As the store's record looks."""

    queue_name: str
    ready: bool = True
    served: bool = True
    due_in_seconds: float | None = None
    oldest_ready_seconds: float = 0.0
    old_marks: bool = False


def in_child(function: Callable[[], None]) -> None:
    """Run it in a forked process and wait for that."""
    pid = os.fork()
    if pid == 0:
        function()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the runner has a thread for its timeout
def test_a_forked_child_writes_and_the_parent_reads(arena: Arena) -> None:
    """All that a worker notes is seen by its parent, also after its death."""
    slot, job, token = arena.slots[1], uuid4(), uuid4()
    slot.open("worker", "host:0badcafe:w1.7", pool="mail", pool_index=2, generation=3)

    def work() -> None:
        slot.pid = os.getpid()
        slot.ready = True
        slot.progress()
        slot.begin(2, job, token, 1234.5)
        slot.add_token(token)
        slot.jobs_done += 5

    in_child(work)
    (running,) = slot.running()
    assert (running.job_id, running.token) == (job, token)
    assert running.deadline == pytest.approx(1234.5)
    assert running.started <= time.monotonic()
    assert slot.tokens() == [token]
    assert (slot.jobs_done, slot.ready, slot.progress_count) == (5, True, 1)
    assert (slot.kind, slot.pool, slot.pool_index, slot.generation) == (Kind.WORKER, "mail", 2, 3)
    assert slot.worker_id == "host:0badcafe:w1.7"


def test_a_slots_life(arena: Arena) -> None:
    """Opening wipes what was there; burying keeps it readable, with exit code, reason and culprit; rescue rings."""
    slot, culprit = arena.slots[0], uuid4()
    slot.open("worker", "first")
    slot.begin(0, uuid4(), uuid4(), None)
    assert slot.death() is None
    slot.bury(-9, "timeout", culprit)
    death = slot.death()
    assert death is not None
    assert (death.exit_code, death.reason, death.culprit) == (-9, Reason.TIMEOUT, culprit)
    assert not slot.live
    assert len(slot.running()) == 1
    assert not arena.answer(arena.bell_master)
    assert slot.state.name == "DEAD"
    slot.rescued()
    assert arena.answer(arena.bell_master)
    assert slot.state.name == "RESCUED"
    slot.open("worker", "second")
    assert (slot.state, slot.running(), slot.death(), slot.worker_id) == (State.STARTING, [], None, "second")
    assert {reason: count for reason, count in arena.exits().items() if count} == {"timeout": 1}


def test_ends_of_services_are_not_counted_as_workers(arena: Arena) -> None:
    """`pmqd_worker_exits_total` is about workers."""
    arena.slots[3].open("web", "x")
    arena.slots[3].bury(1, "error")
    assert sum(arena.exits().values()) == 0


def test_entries_begin_and_end(arena: Arena) -> None:
    """An entry runs between begin and end, its deadline moves, a second end changes nothing, a fourth place does not exist."""
    slot, job, token = arena.slots[0], uuid4(), uuid4()
    slot.begin(0, job, token, None)
    slot.begin(1, uuid4(), token, 5.0)
    slot.set_deadline(0, 9.0)
    assert [one.deadline for one in slot.running()] == [9.0, 5.0]
    slot.end(0)
    slot.end(0)
    assert len(slot.running()) == 1
    slot.begin(0, job, token, None)
    assert slot.running()[0].job_id == job
    with pytest.raises(IndexError, match="3 per slot"):
        slot.begin(3, job, token, None)


def test_tokens_are_bounded(arena: Arena) -> None:
    """A full list of claim batches says so and loses nothing; a dropped one makes room."""
    slot = arena.slots[0]
    first, second, third = uuid4(), uuid4(), uuid4()
    assert slot.add_token(first)
    assert slot.add_token(second)
    assert not slot.add_token(third)
    slot.drop_token(first)
    assert slot.add_token(third)
    assert set(slot.tokens()) == {second, third}


def test_pulse_takes_records_and_mappings(arena: Arena) -> None:
    """Due times become moments of this host's clock; an empty pulse before the first."""
    assert arena.pulse() == {}
    assert arena.pulse_age(time.monotonic()) == math.inf
    before = time.monotonic()
    arena.set_pulse([Pulse("a", due_in_seconds=2.0), vars(Pulse("b", ready=False))])
    pulse = arena.pulse()
    due = pulse["a"]["due_at"]
    assert due is not None
    assert before + 2 <= due <= time.monotonic() + 2
    assert (pulse["b"]["ready"], pulse["b"]["due_at"]) == (False, None)
    assert arena.pulse_age(time.monotonic()) < 5
    arena.set_pulse([])
    assert arena.pulse() == {}


def test_pulse_of_too_many_queues_drops_idle_ones(arena: Arena) -> None:
    """What does not fit gives way, those with ready jobs last."""
    many = [Pulse(f"{n:0100}", ready=False) for n in range(6000)]
    arena.set_pulse([*many, Pulse("busy")])
    pulse = arena.pulse()
    assert "busy" in pulse
    assert 1000 < len(pulse) < 6000


def test_a_writer_that_died_in_the_middle_is_seen_and_repaired(arena: Arena) -> None:
    """An odd sequence number makes readers keep what they had; the next write is whole again."""
    arena.set_pulse([Pulse("a")])
    assert set(arena.pulse()) == {"a"}
    arena.words[arena._pulse_at] |= 1
    assert set(arena.pulse()) == {"a"}
    arena.set_pulse([Pulse("b")])
    assert set(arena.pulse()) == {"b"}


def test_cancels(arena: Arena) -> None:
    """Pairs come back as they went in, bounded."""
    pairs = [(uuid4(), uuid4()) for _ in range(300)]
    arena.cancels = pairs
    assert arena.cancels == pairs[:256]
    arena.cancels = []
    assert arena.cancels == []


def test_one_steal_per_pool_and_second(arena: Arena) -> None:
    """Each pool has its own cell; the cell opens again after the interval."""
    assert arena.try_steal(0, 100.0)
    assert not arena.try_steal(0, 100.9)
    assert arena.try_steal(1, 100.9)
    assert arena.try_steal(0, 101.0)


def test_heartbeat_lease_identity_flags(arena: Arena) -> None:
    """Ages are infinite before the first beat; flags are separate words."""
    now = time.monotonic()
    assert arena.master_age(now) == arena.lease_age(now) == math.inf
    arena.beat_master()
    arena.lease_renewed()
    assert arena.master_age(time.monotonic()) < 5
    assert arena.lease_age(time.monotonic()) < 5
    with pytest.raises(LookupError):
        _ = arena.instance_id
    arena.instance_id = UUID(int=5)
    assert arena.instance_id == UUID(int=5)
    arena.redis_down = True
    assert (arena.draining, arena.redis_down, arena.store_down) == (False, True, False)


def test_reoffer_request_rings_the_migrator(arena: Arena) -> None:
    """The counter moves and the bell is heard; rings before the answer are one."""
    arena.request_reoffer()
    arena.request_reoffer()
    assert arena.reoffer_requests == 2
    assert arena.answer(arena.bell_migrator)
    assert not arena.answer(arena.bell_migrator)
    assert arena.bell_of("migrator") == arena.bell_migrator
    assert arena.bell_of("web") is None


def test_long_names_do_not_spill(arena: Arena) -> None:
    """A worker id longer than its place is cut, and the pool's name behind it is whole."""
    slot = arena.slots[2]
    slot.open("worker", "h" * 500, pool="p" * 100)
    assert slot.worker_id == "h" * 112
    assert slot.pool == "p" * 100


@pytest.mark.parametrize("step", [0, 1])
def test_a_writer_that_dies_in_the_middle_of_a_new_identity_leaves_the_old_one(
    arena: Arena, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Half of the new value written, or all of it but not made to count: everybody still reads the old one, and the next
    writer is not disturbed by it.
    """

    class Died(BaseException):
        """Stands for a SIGKILL."""

    first, second, third = uuid4(), uuid4(), uuid4()
    arena.instance_id = first
    put = arena._put_uuid

    def die(at: int, value: UUID) -> None:
        put(at, UUID(bytes=value.bytes[:8] + bytes(8)) if step == 0 else value)
        raise Died

    with monkeypatch.context() as patch:
        patch.setattr(arena, "_put_uuid", die)
        with pytest.raises(Died):
            arena.instance_id = second
    assert arena.instance_id == first
    for value in (third, second, first):
        arena.instance_id = value
        assert arena.instance_id == value


def test_an_arena_without_identity_says_so(arena: Arena) -> None:
    """Before the master has set one."""
    with pytest.raises(LookupError, match="no instance id"):
        _ = arena.instance_id
