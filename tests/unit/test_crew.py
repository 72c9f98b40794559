"""What the parts around the handlers do when the system has nothing to give, or is about to end."""

import threading
import time
from typing import Any
from uuid import uuid4

import pytest

from pmqd import App, delivery
from pmqd.arena import Arena
from pmqd.delivery import Delivery
from pmqd.hints import Hint
from pmqd.settings import RedisSettings
from tests.unit.test_executor import Bench, claimed


def test_a_thread_that_cannot_be_started_costs_no_place(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system refuses threads for a while: the jobs wait, run when it gives some, on all their places, and it is said once."""
    app = App()

    @app.task(queue="q")
    def nothing() -> None: ...

    @app.task(queue="q")
    def slow() -> None:
        time.sleep(1.0)

    start, refused = threading.Thread.start, 0

    def refuse(thread: threading.Thread) -> None:
        nonlocal refused
        if thread.name.startswith("runner-") and refused < 5:
            refused += 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    bench = Bench(app, concurrency=2)
    ended = bench.run(*(claimed("nothing") for _ in range(6)), claimed("slow"))
    assert len(ended) == 7
    assert refused == 5
    assert caplog.text.count("no thread can be started") == 1
    assert sorted(bench.desk._idle) == [0, 1]


def test_a_probe_that_is_answered_after_the_end_wakes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis answers the probe of a worker that has closed meanwhile: what it popped goes back, and the bell, which may be another
    file by now, is not rung.
    """
    asked, answer = threading.Event(), threading.Event()
    given_back: list[Any] = []

    class Slow:
        """A Redis whose answer comes when the test says so."""

        popping = False

        def __init__(self, *_: object) -> None: ...

        def queue_key(self, queue: str, band: str) -> str:
            """As the broker's."""
            return f"{queue}:{band}"

        def server_life(self) -> None:
            """As the broker's."""

        def pop_start(self, *_: object) -> None:
            """As the broker's."""

        def pop_finish(self) -> list[Hint]:
            """Waits for the test."""
            asked.set()
            assert answer.wait(10)
            return [Hint("q", uuid4(), b"1")]

        def give_back(self, hints: list[Any]) -> None:
            """As the broker's."""
            given_back.extend(hints)

        def reset(self) -> None:
            """As the broker's."""

    monkeypatch.setattr(delivery, "Broker", Slow)
    rings: list[str] = []
    slot = Arena.create(1, entries=1).slots[0]
    one = Delivery(RedisSettings(), "worker", slot, [("q", "normal")], lambda: rings.append("rung"))
    probe = threading.Thread(target=one._try_pop)
    probe.start()
    assert asked.wait(10)
    one.close()
    answer.set()
    probe.join(10)
    assert (rings, given_back) == ([], [("q", b"1")])


def test_a_slow_handler_holds_up_nobody_though_quick_ones_share_a_thread() -> None:
    """Quick jobs run one after the other; behind one that blocks they go on in other threads at once."""
    app = App()
    go_on = threading.Event()
    threads: set[int] = set()

    @app.task(queue="q")
    def quick() -> None: ...

    @app.task(queue="q")
    def slow() -> None:
        threads.add(threading.get_ident())
        assert go_on.wait(10)

    @app.task(queue="q")
    def last() -> None:
        go_on.set()

    bench = Bench(app, concurrency=8)
    ended = bench.run(
        *(claimed("slow") for _ in range(7)), *(claimed("quick") for _ in range(100)), claimed("last")
    )
    assert {each.outcome.action for each in ended} == {"complete"}
    assert len(threads) == 7
