"""The self-fence's decisions: what must die, what may start, and when PostgreSQL's absence counts."""

import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from pmqd import App, fence
from pmqd.arena import Arena, boottime
from pmqd.config import Settings
from pmqd.desk import Desk, Item
from pmqd.executor import Executor
from pmqd.fence import FENCE_SECONDS, Refusals, addresses, doomed, is_wanted, may_start, refuses
from pmqd.job import Action, Claimed
from pmqd.retry import RetryPolicy
from pmqd.slot import Slot, State


@pytest.fixture
def arena() -> Arena:
    """An arena of an instance whose lease was renewed just now."""
    made = Arena.create(slots=4, entries=4)
    made.instance_id = uuid4()
    made.lease_renewed()
    return made


@pytest.fixture
def slot(arena: Arena) -> Slot:
    """A worker that runs a job of each sort."""
    slot = arena.slots[0]
    slot.open("worker", "h:abc:w0.1")
    slot.state = State.BUSY
    slot.begin(0, uuid4(), uuid4(), None)
    slot.begin(1, uuid4(), uuid4(), None, abort=True)
    return slot


def renewed_ago(arena: Arena, seconds: float) -> None:
    """The last renewal was asked for so long ago."""
    arena.lease_renewed(boottime() - seconds)


def test_only_what_asks_for_it_dies_and_only_when_the_lease_is_old(arena: Arena, slot: Slot) -> None:
    """Up to 25 seconds after the last renewal was asked for nothing dies; from then on the jobs of an "abort" queue do."""
    renewed_ago(arena, FENCE_SECONDS - 1)
    assert doomed(arena, slot) == []
    renewed_ago(arena, FENCE_SECONDS)
    assert [job.abort for job in doomed(arena, slot)] == [True]
    assert doomed(arena, slot, after=fence.WATCH_SECONDS) == [], "the children leave it to the master first"
    slot.end(1)
    assert doomed(arena, slot) == []


def test_what_ran_under_a_lost_identity_dies_though_the_new_lease_is_fresh(arena: Arena, slot: Slot) -> None:
    """After a long freeze maintenance may take a new identity before the master has looked: the old jobs die all the same."""
    arena.instance_id = uuid4()
    arena.lease_renewed()
    assert len(doomed(arena, slot)) == 1
    slot.begin(2, uuid4(), uuid4(), None, abort=True)
    assert len(doomed(arena, slot)) == 1, "the one that was started afterwards is held by the new lease"


def test_the_dead_and_the_services_are_left_alone(arena: Arena, slot: Slot) -> None:
    """A slot whose process was reaped may belong to a pid that is somebody else's by now."""
    renewed_ago(arena, 100)
    slot.bury(-9, "signal")
    assert doomed(arena, slot) == []


def test_nothing_starts_late_nor_under_an_old_identity(arena: Arena) -> None:
    """A claim that was sent before the identity changed, or whose lease is old, starts nothing."""
    asked = time.monotonic()
    assert may_start(arena, asked)
    renewed_ago(arena, FENCE_SECONDS)
    assert not may_start(arena, asked)
    arena.instance_id = uuid4()
    arena.lease_renewed()
    assert not may_start(arena, asked)
    assert may_start(arena, time.monotonic())


def test_nothing_starts_before_the_first_renewal() -> None:
    """Nobody knows yet how old the lease is."""
    arena = Arena.create(slots=1, entries=1)
    arena.instance_id = uuid4()
    assert not may_start(arena, time.monotonic())


def test_an_isolated_death_is_the_watchers_word(arena: Arena, slot: Slot) -> None:
    """Whoever kills in the master's place leaves the reason in the slot, and the next process does not inherit it."""
    slot.isolated = True
    slot.open("worker", "h:abc:w0.2")
    assert not slot.isolated


def test_the_fence_is_wanted_where_a_queue_asks_for_it() -> None:
    """Without such a queue no child watches."""
    assert not is_wanted(Settings.model_validate({"queues": {"a": {}}}))
    assert is_wanted(Settings.model_validate({"queues": {"a": {}, "b": {"isolation": "abort"}}}))


@pytest.mark.parametrize("abort", [True, False])
def test_a_late_job_is_given_back_unstarted(arena: Arena, *, abort: bool) -> None:
    """The lease is old when a claimed job comes to its turn: one that must not outlive it is released, any other runs."""
    app, ran = App(), list[str]()

    @app.task(queue="q", name="job")
    def job() -> None:
        ran.append("ran")

    slot = arena.slots[0]
    slot.open("worker", "h:abc:w0.1")
    desk = Desk(1, slot, lambda: None)
    store: Any = None
    executor = Executor(desk, slot, "h:abc:w0.1", 5.0, lambda: store, may_start=partial(may_start, arena))
    desk.dispatch = executor.run_in_thread  # type: ignore[assignment]
    renewed_ago(arena, FENCE_SECONDS)
    now = datetime.now(UTC)
    claimed = Claimed(
        uuid4(),
        "q",
        "job",
        100,
        "{}",
        1,
        0,
        3,
        now.timestamp(),
        now.timestamp(),
        (),
        alone=False,
        token=uuid4(),
        claimed_at=now.timestamp(),
    )
    moment = time.monotonic()
    desk.hand_over([Item(claimed, job, 30.0, RetryPolicy(), moment, moment, abort=abort)])
    [finished] = desk.collect()
    assert (finished.outcome.action, ran) == ((Action.RELEASE, []) if abort else (Action.COMPLETE, ["ran"]))
    assert slot.running() == []


@pytest.mark.parametrize(
    ("dsn", "found"),
    [
        ("postgresql://u@db/x", [("db", 5432)]),
        ("postgresql://u@one:6000,two:6001/x", [("one", 6000), ("two", 6001)]),
        ("host=one,two port=7000 dbname=x", [("one", 7000), ("two", 7000)]),
        ("host=name hostaddr=10.0.0.1 dbname=x", [("10.0.0.1", 5432)]),
        ("host=/run/postgresql dbname=x", [("/run/postgresql", 5432)]),
        ("dbname=x", []),
        ("service=main", []),
        ("host=a,b port=1,2,3 dbname=x", []),
    ],
)
def test_all_servers_of_a_connection_string_are_asked(dsn: str, found: list[tuple[str, int]]) -> None:
    """Where they cannot be known nobody is asked, and the fence's clock runs."""
    assert addresses(dsn, environ={}) == found


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A listening socket that nobody accepts from."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def test_a_closed_port_refuses_and_a_silent_one_does_not(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ECONNREFUSED and a missing socket are the server's word; a connection that says nothing is not."""
    monkeypatch.setattr(fence, "PROBE_SECONDS", 0.2)
    host, port = listener.getsockname()
    assert not refuses((host, port))
    listener.close()
    assert refuses((host, port))
    assert refuses((str(tmp_path), 5432))
    assert not refuses(("no-such-host.invalid", 5432))


def test_a_server_that_starts_or_stops_refuses(listener: socket.socket) -> None:
    """PostgreSQL accepts the connection and says 57P03: it lets nobody in."""
    answers = [
        b"E\x00\x00\x00\x20SFATAL\x00C57P03\x00Mstarting up\x00\x00",
        b"R\x00\x00\x00\x08\x00\x00\x00\x00",
    ]

    def serve() -> None:
        for answer in answers:
            client, _ = listener.accept()
            with client:
                assert client.recv(100).endswith(b"user\x00postgres\x00\x00")
                client.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    host, port = listener.getsockname()
    assert refuses((host, port))
    assert not refuses((host, port)), "it lets people in"
    thread.join()


def test_refused_time_is_not_counted_and_unknown_time_is(
    arena: Arena, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two refusals close together no lease ages; before the first, and after a long silence, the clock runs."""
    clock = 1000.0
    monkeypatch.setattr(fence, "boottime", lambda: clock)
    monkeypatch.setattr("pmqd.arena.boottime", lambda: clock)
    port = listener.getsockname()[1]
    listener.close()
    refusals = Refusals(arena, f"host=127.0.0.1 port={port}")
    arena.lease_renewed(clock)
    for _ in range(100):
        clock += 0.5
        refusals.hear()
    assert arena.lease_spent() == pytest.approx(0.5, abs=0.01)
    clock += 10
    refusals.hear()
    assert arena.lease_spent() == pytest.approx(10.5, abs=0.01)
    refusals.over()
    clock += 1
    refusals.hear()
    assert arena.lease_spent() == pytest.approx(11.5, abs=0.01), "an answer came in between"


def test_one_server_that_does_not_refuse_is_enough_to_run_the_clock(
    arena: Arena, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several servers one that is merely silent may be writable for others."""
    monkeypatch.setattr(fence, "PROBE_SECONDS", 0.1)
    port = listener.getsockname()[1]
    refusals = Refusals(arena, f"host=127.0.0.1,127.0.0.1 port=1,{port}")
    renewed_ago(arena, 5)
    for _ in range(3):
        refusals.hear()
    assert arena.lease_spent() >= 5
