"""The checker of chaos runs: for every invariant a story that must pass and stories that must be caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from pmqd.chaos.checks_history import (
    CANCELLED,
    COMPLETED,
    EPOCH_US,
    FAILED,
    MARKED,
    NONE,
    NOTHING,
    QUEUED,
    RUNNING,
    Row,
    Story,
    Surroundings,
    Transition,
    stories,
)
from pmqd.chaos.checks_job import Sums, judge
from pmqd.chaos.checks_runs import Around, Clocks

ONE_CLOCK = Clocks(to_database=-EPOCH_US, to_monotonic=0, slack=0)
QUEUE = "chaos-mail"
SECOND = 1_000_000


class Tale:
    """A job's story as it is told: each step a second (`step`) later than the one before, on all clocks."""

    def __init__(self) -> None:
        self.job = uuid4()
        self.now = 1000 * SECOND
        self.changes: list[Transition] = []
        self.handlers: list[bytes] = []
        self.producers: list[bytes] = []
        self.row: Row | None = None
        self.seen = Surroundings()
        self.lost_lease = False
        self.step = SECOND

    def asked(self, mark: str = "+") -> Tale:
        """The producer's lines: what was asked for, and the answer."""
        self._say(f"? {self.job} {self._mono()} quick {QUEUE} 3 100 0")
        if mark:
            self._say(f"{mark} {self.job} {self._mono()}")
        return self

    def said(self, mark: str) -> Tale:
        """One more line of a producer."""
        self._say(f"{mark} {self.job} {self._mono()}")
        return self

    def _say(self, line: str) -> None:
        self.producers.append(line.encode())

    def to(
        self,
        status: bytes,
        *,
        token: bytes | None = None,
        attempt: int = 0,
        interruptions: int = 0,
        run_at: int = 0,
        again: bool = False,
    ) -> Tale:
        """A transition; attempt and interruptions are what is added."""
        self.now += self.step
        last = self.changes[-1] if self.changes else None
        before = last or Transition(0, b"", 0, 0, self.now, b"", NOTHING, NONE, NONE, 0, 0, 3)
        self.changes.append(
            Transition(
                seq=len(self.changes) + 1,
                job=self.job.bytes,
                at=self.now,
                began=self.now,
                run_at=run_at or before.run_at,
                old=before.new,
                new=status,
                old_token=before.new_token,
                new_token=before.new_token if token is None else token,
                attempt=0 if again else before.attempt + attempt,
                interruptions=0 if again else before.interruptions + interruptions,
                max_attempts=3,
            )
        )
        return self

    def queued(self) -> Tale:
        """Asked for, acknowledged, inserted."""
        return self.asked().to(QUEUED)

    def claimed(self, mark: bool = True) -> Tale:
        """Marked and claimed."""
        if mark:
            self.to(MARKED)
        return self.to(RUNNING, token=uuid4().bytes, attempt=1)

    @property
    def token(self) -> UUID:
        """Of the last claim."""
        return UUID(
            bytes=next(change.new_token for change in reversed(self.changes) if change.new == RUNNING)
        )

    def start(self, pid: int = 1, token: UUID | None = None) -> Tale:
        """User code starts."""
        self.now += self.step
        words = f"{self.changes[-1].attempt} {token or self.token} {pid} {self._mono()} {self._wall()}"
        self.handlers.append(f"S {self.job} {words}".encode())
        return self

    def end(self, how: str = "ok", pid: int = 1, token: UUID | None = None) -> Tale:
        """User code ends."""
        self.now += self.step
        words = f"{self.changes[-1].attempt} {token or self.token} {pid} {self._mono()} {self._wall()} {how}"
        self.handlers.append(f"E {self.job} {words}".encode())
        return self

    def dies(self, pid: int = 1) -> Tale:
        """A process is gone."""
        self.now += self.step
        self.seen.deaths.setdefault(pid, []).append(self.now)
        return self

    def ran(self) -> Tale:
        """Claimed, started and ended."""
        return self.claimed().start().end()

    def done(self) -> Tale:
        """Completed by whoever claimed it last."""
        return self.to(COMPLETED)

    def problems(self) -> list[str]:
        """What the checker finds; the row is as the last transition left it, where nothing else was said."""
        last = self.changes[-1] if self.changes else None
        row = self.row
        if row is None and last is not None:
            row = Row(self.job.bytes, last.new, last.new_token, last.attempt, last.interruptions, 100, QUEUE)
        for line in self.handlers:
            self.seen.last_sign[int(line.split()[4])] = int(line.split()[5]) // 1000
        story = Story(self.job.bytes, self.changes, self.handlers, self.producers, row)
        around = Around(self.seen, ONE_CLOCK, lambda _job: self.lost_lease)
        return [name for name, _ in judge(story, around, Sums())]

    def _mono(self) -> int:
        return self.now * 1000

    def _wall(self) -> int:
        return self.now + EPOCH_US


def hinted(tale: Tale) -> list[int]:
    """Who is left out when the order of marking is judged, in the line of the tale's job."""
    row = Row(tale.job.bytes, COMPLETED, tale.changes[-1].new_token, 1, 0, 100, QUEUE)
    sums = Sums()
    story = Story(tale.job.bytes, tale.changes, tale.handlers, tale.producers, row)
    judge(story, Around(tale.seen, ONE_CLOCK, lambda _job: False), sums)
    [line] = sums.lines.values()
    return list(line.hinted)


def gone(tale: Tale) -> list[str]:
    """What is found when the row is not there."""
    story = Story(tale.job.bytes, tale.changes, tale.handlers, tale.producers, None)
    return [name for name, _ in judge(story, Around(tale.seen, ONE_CLOCK, lambda _job: False), Sums())]


def rescued(tale: Tale, charge: int = 0, interruptions: int = 0) -> Tale:
    """Given back after its process has died."""
    return tale.to(QUEUED, token=NONE, attempt=charge, interruptions=interruptions)


GOOD: dict[str, Callable[[], Tale]] = {
    "marked": lambda: Tale().queued().ran().done(),
    "stolen": lambda: Tale().queued().claimed(mark=False).start().end().done(),
    "claimed by a hint of its producer": lambda: (
        Tale().asked().said("h").to(QUEUED).claimed(mark=False).start().end().done()
    ),
    "settled itself": lambda: Tale().queued().claimed().start().end("kept").done(),
    "unknown, and there": lambda: Tale().asked("").to(QUEUED).ran().done(),
    "retried": lambda: Tale().queued().claimed().start().end("error").to(QUEUED).ran().done(),
    "snoozed": lambda: Tale().queued().claimed().start().end("snooze").to(QUEUED, attempt=-1).ran().done(),
    "released": lambda: Tale().queued().claimed().to(QUEUED, attempt=-1).ran().done(),
    "failed": lambda: Tale().queued().claimed().start().end("fail").to(FAILED),
    "cancelled while waiting": lambda: Tale().queued().said("c").to(CANCELLED).said("C"),
    "cancelled while running": lambda: (
        Tale().queued().claimed().start().said("c").said("C").end("cancelled").to(CANCELLED)
    ),
    "finished before its cancel": lambda: Tale().queued().claimed().start().said("c").said("C").end().done(),
    "charged by a crash": lambda: rescued(Tale().queued().claimed().start().dies()).ran().done(),
    "interrupted by a crash": lambda: (
        rescued(Tale().queued().claimed().start().dies(), -1, 1).claimed().start(2).end("ok", 2).done()
    ),
    "interrupted by a drain": lambda: (
        Tale().queued().claimed().start().to(QUEUED, attempt=-1, interruptions=1).dies().ran().done()
    ),
    "rescued unstarted": lambda: rescued(Tale().queued().claimed(), -1).ran().done(),
    "run again, as its process died before it told": lambda: (
        rescued(Tale().queued().claimed().start().end().dies(), -1, 1).claimed().start(2).end("ok", 2).done()
    ),
    "replayed": lambda: (
        Tale().queued().claimed().start().end("fail").to(FAILED).said("r").said("R")
        .to(QUEUED, token=NONE, again=True).ran().done()
    ),
    "replay unknown": lambda: Tale().queued().claimed().start().end("fail").to(FAILED).said("r"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_what_may_be_passes(name: str) -> None:
    """Stories that the product's promises allow are found in order, the quick way and the thorough way."""
    assert GOOD[name]().problems() == []


def test_what_ends_only_because_all_is_stopped_was_stuck() -> None:
    """A job whose last transition comes after the wait for the end of all jobs is stuck, ordinary as it may look."""
    in_time, late = Tale().queued().ran().done(), Tale().queued().ran().done()
    in_time.seen.drained = in_time.changes[-1].seq
    late.seen.drained = late.changes[-1].seq - 1
    assert (in_time.problems(), late.problems()) == ([], ["stuck"])


def test_only_a_hint_of_its_producer_excuses_a_claim_without_a_mark() -> None:
    """Of jobs that were claimed unmarked those that the client may have hinted are left out; one that was marked is not."""
    assert hinted(Tale().asked().said("h").to(QUEUED).claimed(mark=False).start().end().done()) == [1]
    assert hinted(Tale().asked().said("h").to(QUEUED).ran().done()) == [0]
    assert hinted(Tale().queued().claimed(mark=False).start().end().done()) == [0]


def _after_its_end() -> Tale:
    tale = Tale().queued().ran().done()
    return tale.to(QUEUED, token=NONE, attempt=-1)


def _same_token_again() -> Tale:
    tale = Tale().queued().ran()
    token = tale.token.bytes
    return tale.to(QUEUED).to(RUNNING, token=token, attempt=1).start().end().done()


def _beside() -> Tale:
    tale = rescued(Tale().queued().claimed().start(), -1, 1).claimed()
    return tale.start(2).start(1, uuid4()).end("ok", 2).done()


def _twice_at_once() -> Tale:
    tale = Tale().queued().claimed().start()
    first = tale.token
    tale = rescued(tale, -1, 1).claimed().start(2).end("ok", 2)
    return tale.end("ok", 1, first).done()


def _many_interruptions() -> Tale:
    tale = Tale().queued()
    for pid in range(1, 7):
        tale = rescued(tale.claimed().start(pid).dies(pid), -1, 1)
    return tale.claimed().start(9).end("ok", 9).done()


def _four_attempts() -> Tale:
    tale = Tale().queued()
    for _ in range(3):
        tale = tale.claimed().start().end("error").to(QUEUED)
    return tale.ran().done()


def _zombie() -> Tale:
    tale = Tale().queued().claimed().start().dies()
    return rescued(tale, -1, 1).claimed().start(2).done().end("ok", 2)


def _unseen() -> Tale:
    tale = Tale().queued().ran().done()
    tale.changes[2] = tale.changes[2]._replace(new_token=uuid4().bytes)
    return tale


def _twice_in_one_life() -> Tale:
    tale = Tale().queued().ran()
    return tale.to(QUEUED).ran().done()


BAD: dict[str, Callable[[], Tale]] = {
    "early": lambda: Tale().queued().to(MARKED, run_at=10**15).claimed(mark=False).start().end().done(),
    "early without a claim": lambda: Tale().queued().start(1, uuid4()),
    "resurrected": _after_its_end,
    "doubled: ended again": lambda: Tale().queued().claimed().start().end("fail").to(FAILED).to(COMPLETED),
    "doubled: a life nobody asked for": lambda: (
        Tale().queued().claimed().start().end("fail").to(FAILED).to(QUEUED, token=NONE, again=True).ran().done()
    ),
    "doubled: run to its end twice": _twice_in_one_life,
    "lost: a replay": lambda: Tale().queued().claimed().start().end("fail").to(FAILED).said("r").said("R"),
    "illegal_transition: an old token": _same_token_again,
    "illegal_transition: claimed while it ran": lambda: Tale().queued().claimed().claimed(mark=False).start().end().done(),
    "illegal_transition: unseen": _unseen,
    "illegal_transition: no charge": lambda: (
        Tale().queued().to(MARKED).to(RUNNING, token=uuid4().bytes).start().end().to(COMPLETED, attempt=1)
    ),
    "illegal_transition: marks do not go back": lambda: Tale().queued().to(MARKED).to(QUEUED).ran().done(),
    "illegal_transition: completed by a rescue": lambda: Tale().queued().ran().to(COMPLETED, token=NONE),
    "illegal_transition: a cancel forgotten": lambda: (
        Tale().queued().claimed().start().said("c").said("C").end("error").to(QUEUED).ran().done()
    ),
    "stale_settled: another token": lambda: Tale().queued().ran().to(COMPLETED, token=uuid4().bytes),
    "stale_settled: before its handler ended": _zombie,
    "stale_settled: no handler at all": lambda: Tale().queued().claimed().done(),
    "false_rescue": lambda: rescued(Tale().queued().claimed().start(), -1, 1).claimed().start(1).end().done(),
    "overlapped: open": _beside,
    "overlapped: both ended": _twice_at_once,
    "over_attempted: interruptions": _many_interruptions,
    "over_attempted: attempts": _four_attempts,
    "over_attempted: given back though it started": lambda: (
        rescued(Tale().queued().claimed().start().dies(), -1).claimed().start(2).end("ok", 2).done()
    ),
    "over_attempted: started twice under one claim": lambda: (
        Tale().queued().claimed().start().end("error").start().end().done()
    ),
    "stuck": lambda: Tale().queued().claimed(),
    "stuck: marked": lambda: Tale().queued().to(MARKED),
    "unknown: refused": lambda: Tale().asked("-").to(QUEUED).ran().done(),
    "unknown: nobody asked": lambda: Tale().to(QUEUED).ran().done(),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_may_not_be_is_caught(name: str) -> None:
    """Each broken invariant is found, under its own name."""
    assert name.split(":", maxsplit=1)[0].split(" ", maxsplit=1)[0] in BAD[name]().problems()


def test_an_acknowledged_job_without_a_row_is_lost() -> None:
    """Kept: no row is a loss if it was acknowledged or has been there; unknown and never there is in order."""
    assert gone(Tale().asked()) == ["lost"]
    assert gone(Tale().asked("").to(QUEUED)) == ["lost"]
    assert gone(Tale().asked("")) == []
    assert gone(Tale().asked("-")) == []


def test_a_row_that_is_not_what_was_asked_for() -> None:
    """The queue, the priority and the attempts of the row are those of the enqueue."""
    tale = Tale().queued().ran().done()
    last = tale.changes[-1]
    for priority, queue in ((7, QUEUE), (100, "chaos-bulk")):
        tale.row = Row(tale.job.bytes, last.new, last.new_token, last.attempt, 0, priority, queue)
        assert tale.problems() == ["unknown"]


def test_a_row_changed_behind_the_back_of_the_trigger() -> None:
    """The row in the end is what its last transition made it."""
    tale = Tale().queued().ran().done()
    tale.row = Row(tale.job.bytes, FAILED, tale.token.bytes, 1, 0, 100, QUEUE)
    assert "illegal_transition" in tale.problems()


def test_overlap_while_stopped_is_none() -> None:
    """A stopped process runs nothing: what another one runs meanwhile does not overlap; what it runs afterwards does."""
    tale = Tale().queued().claimed().start()
    stopped, first = tale.now, tale.token
    tale.lost_lease = True
    tale = rescued(tale, -1, 1).claimed().start(2).end("ok", 2)
    tale.seen.pauses[1] = [(stopped, tale.now)]
    tale = tale.done().end("ok", 1, first)
    assert tale.problems() == []
    tale.seen.pauses[1] = [(stopped, tale.now - 10 * SECOND)]
    assert tale.problems() == ["overlapped_after_lost_lease"]


def test_a_death_noted_late_makes_no_overlap() -> None:
    """The rescue may be quicker than whoever notes the death; a line that the dead process wrote later would betray it."""
    tale = Tale()
    tale.step = SECOND // 100
    tale = rescued(tale.queued().claimed().start(), -1, 1).claimed().start(2)
    tale.seen.deaths[1] = [tale.now + SECOND // 2]
    assert tale.end("ok", 2).done().problems() == []
    betrayed = Story(tale.job.bytes, tale.changes, tale.handlers, tale.producers, None)
    tale.seen.last_sign[1] = tale.now
    around = Around(tale.seen, ONE_CLOCK, lambda _job: False)
    assert "overlapped" in [name for name, _ in judge(betrayed, around, Sums())]


def test_sums() -> None:
    """What is run again because its process died is counted, and how long it took to be given back."""
    sums = Sums()
    tale = GOOD["interrupted by a crash"]()
    last = tale.changes[-1]
    row = Row(tale.job.bytes, last.new, last.new_token, last.attempt, last.interruptions, 100, QUEUE)
    story = Story(tale.job.bytes, tale.changes, tale.handlers, tale.producers, row)
    assert judge(story, Around(tale.seen, ONE_CLOCK, lambda _job: False), sums) == []
    assert (sums.acknowledged, sums.re_executed, sums.slowest_recovery) == (1, 1, SECOND)


def test_clocks_that_were_set_are_not_compared() -> None:
    """After a step of a clock only what needs no comparison of two clocks is checked."""
    tale = Tale().queued().claimed().start().end()
    tale.handlers = [line.replace(b" 9466", b" 9966") for line in tale.handlers]  # E an hour ahead
    tale = tale.done()
    assert "stale_settled" in tale.problems()
    story = Story(
        tale.job.bytes,
        tale.changes,
        tale.handlers,
        tale.producers,
        Row(tale.job.bytes, COMPLETED, tale.token.bytes, 1, 0, 100, QUEUE),
    )
    around = Around(tale.seen, replace(ONE_CLOCK, slack=-1), lambda _job: False)
    assert judge(story, around, Sums()) == []


def test_stories_are_merged_by_job() -> None:
    """What four sources say of one job comes together, also where some of them do not know it."""
    tales = sorted((Tale().queued().ran().done() for _ in range(3)), key=lambda tale: tale.job.bytes)
    only_asked = Tale().asked("")
    moved: Iterator[Transition] = (change for tale in tales for change in tale.changes)
    final = iter([Row(tales[1].job.bytes, COMPLETED, NONE, 1, 0, 100, QUEUE)])
    handlers = [line for tale in tales for line in tale.handlers]
    producers = sorted(
        (line for tale in [*tales, only_asked] for line in tale.producers), key=lambda line: line[2:38]
    )
    found = {story.job: story for story in stories(moved, final, handlers, producers)}
    assert list(found) == sorted(found)
    assert found[only_asked.job.bytes] == (only_asked.job.bytes, [], [], only_asked.producers, None)
    for place, tale in enumerate(tales):
        story = found[tale.job.bytes]
        assert (story.transitions, story.handlers, story.producers) == (
            tale.changes,
            tale.handlers,
            tale.producers,
        )
        assert (story.row is not None) == (place == 1)
