"""One job's story against every invariant that concerns it alone; nearly all are ordinary, and those are let through quickly. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pmqd.chaos import checks_runs
from pmqd.chaos.application import QUICK_QUEUES
from pmqd.chaos.checks_history import (
    CANCELLED,
    COMPLETED,
    EPOCH_US,
    MARKED,
    NAMES,
    NONE,
    NOTHING,
    QUEUED,
    RUNNING,
    TERMINAL,
    Story,
)
from pmqd.chaos.checks_runs import Around, Clocks
from pmqd.chaos.checks_time import Line, Pace
from pmqd.chaos.checks_walk import Problem, Walk, walk
from pmqd.job import band_of

_BY_MARK: Final = (NOTHING + QUEUED + MARKED + RUNNING, QUEUED + MARKED + RUNNING + COMPLETED)
_BY_STEAL: Final = (NOTHING + QUEUED + RUNNING, QUEUED + RUNNING + COMPLETED)
_BANDS: Final = {priority: band_of(priority) for priority in range(1, 1001)}
_CANCEL_US: Final = 100_000


class Asked(NamedTuple):
    """What the producers recorded of a job; monotonic microseconds.

    Attributes:
        queue: where it was to go; "" where nobody asked for it.
        priority: with which priority.
        max_attempts: with how many attempts.
        run_at: not before (microseconds since 2000); 0: the database decided.
        acknowledged: when; 0: never.
        refused: it was refused.
        hinted: its client may have pushed its hint by itself.
        cancelled: when its cancel was accepted; 0: it was not.
        replays_asked: how often a new life was asked for.
        replays_done: how often that was acknowledged.
    """

    queue: str = ""
    priority: int = 0
    max_attempts: int = 0
    run_at: int = 0
    acknowledged: int = 0
    refused: bool = False
    hinted: bool = False
    cancelled: int = 0
    replays_asked: int = 0
    replays_done: int = 0


def asked(lines: Sequence[bytes]) -> Asked:
    """What the producers' lines of one job say."""
    found: dict[str, int | str | bool] = {}
    for line in lines:
        mark, words = line[:1], line.split()
        if mark == b"?":
            run_at = int(words[7])
            found |= {
                "queue": words[4].decode(),
                "max_attempts": int(words[5]),
                "priority": int(words[6]),
                "run_at": run_at - EPOCH_US if run_at else 0,
            }
        elif mark == b"+":
            found["acknowledged"] = int(words[2]) // 1000
        elif mark == b"-":
            found["refused"] = True
        elif mark == b"h":
            found["hinted"] = True
        elif mark == b"C":
            found["cancelled"] = int(words[2]) // 1000
        elif mark == b"r":
            found["replays_asked"] = int(found.get("replays_asked", 0)) + 1
        elif mark == b"R":
            found["replays_done"] = int(found.get("replays_done", 0)) + 1
    return Asked(**found)  # type: ignore[arg-type] # each by its name


@dataclass
class Sums:
    """What is added up over all jobs; microseconds."""

    acknowledged: int = 0
    re_executed: int = 0
    slowest_recovery: int = 0
    lines: dict[tuple[str, str], Line] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)


def judge(story: Story, around: Around, sums: Sums) -> list[Problem]:
    """All that is wrong with one job.

    Args:
        story: of the job.
        around: the world around it.
        sums: what is added up over all jobs.
    """
    wish = asked(story.producers)
    sums.acknowledged += bool(wish.acknowledged)
    if story.row is not None and wish.acknowledged:
        _note_times(story, wish, around.clocks, sums)
    late = _late(story, around.seen.drained)
    if not late and _ordinary(story, wish, around.clocks):
        return []
    walked = walk(story.transitions)
    _note_recovery(story, walked, around, sums)
    return [
        *late,
        *_kept(story, wish),
        *walked.problems,
        *_as_asked(story, wish, walked, around.clocks),
        *checks_runs.problems(story, walked, around),
    ]


def _late(story: Story, drained: float) -> list[Problem]:
    """What ends only because its worker is stopped would have stayed as it was for as long as that worker lives."""
    moved = story.transitions[-1].seq if story.transitions else 0
    return [("stuck", "moved only after everything had had its time to end")] if moved > drained else []


def _ordinary(story: Story, wish: Asked, clocks: Clocks) -> bool:
    """Enqueued, acknowledged, marked or stolen, claimed, run once, completed: whether nothing at all is special about it."""
    changes, lines, row = story.transitions, story.handlers, story.row
    if row is None or len(lines) != 2 or len(story.producers) != 2 or not wish.acknowledged or wish.refused:
        return False
    shape = (b"".join([each.old for each in changes]), b"".join([each.new for each in changes]))
    if shape != _BY_MARK and shape != _BY_STEAL:  # noqa: PLR1714 - two comparisons are faster than a tuple
        return False
    claim, end = changes[-2], changes[-1]
    token = claim.new_token
    if not (
        token != NONE
        and row.status == COMPLETED
        and token == end.old_token == end.new_token == row.token
        and claim.old_token == changes[0].new_token == NONE
        and changes[-3].new_token == changes[-3].old_token == NONE
        and claim.attempt == end.attempt == row.attempt == 1
        and changes[0].attempt == changes[-3].attempt == 0
        and not (
            changes[0].interruptions or changes[-3].interruptions or claim.interruptions or end.interruptions
        )
        and changes[0].max_attempts == changes[-3].max_attempts == claim.max_attempts == end.max_attempts
        and claim.began >= claim.run_at
        and _same(story, wish)
    ):
        return False
    start, over = lines[0].split(), lines[1].split()
    return (
        start[0] == b"S"
        and over[0] == b"E"
        and over[7] in (b"ok", b"kept")
        and start[2:5] == over[2:5]
        and bytes.fromhex(start[3].replace(b"-", b"").decode()) == token
        and clocks.comparable
        and int(over[6]) + clocks.to_database <= end.at + clocks.slack
        and int(start[6]) + clocks.to_database + clocks.slack >= claim.began
    )


def _same(story: Story, wish: Asked) -> bool:
    """Whether the row is what was asked for."""
    row, first = story.row, story.transitions[0]
    return row is None or (
        (wish.queue, wish.priority, wish.max_attempts) == (row.queue, row.priority, first.max_attempts)
        and wish.run_at in (0, first.run_at)
    )


def _kept(story: Story, wish: Asked) -> Iterator[Problem]:
    """Every acknowledged enqueue is a row that has come to its end; none is there that nobody asked for."""
    row = story.row
    if row is None:
        yield from _missing(story, wish)
        return
    if not wish.queue:
        yield "unknown", "a row that nobody asked for"
    elif wish.refused:
        yield "unknown", "refused, and it is there"
    elif story.transitions and not _same(story, wish):
        yield "unknown", f"the row is not what was asked for: {wish}"
    if row.status not in TERMINAL:
        yield "stuck", f"{NAMES[row.status]} when everything had ended"
    if not story.transitions:
        yield "illegal_transition", "a row without a first transition"
        return
    last = story.transitions[-1]
    ended = (last.new, last.new_token, last.attempt, last.interruptions)
    if ended != (row.status, row.token, row.attempt, row.interruptions):
        yield "illegal_transition", "the row is not as its last transition left it"


def _missing(story: Story, wish: Asked) -> Iterator[Problem]:
    if wish.acknowledged:
        yield "lost", "acknowledged, and there is no row"
    elif story.transitions:
        yield "lost", "its row was there, and is gone"
    elif story.handlers:
        yield "unknown", "it ran, and there was never a row"


def _as_asked(story: Story, wish: Asked, walked: Walk, clocks: Clocks) -> Iterator[Problem]:
    """New lives are only given where they were asked for, and an accepted cancel is not forgotten."""
    if walked.replays > wish.replays_asked:
        yield "doubled", f"{walked.replays} new lives, and {wish.replays_asked} were asked for"
    if walked.replays < wish.replays_done:
        yield "lost", f"{wish.replays_done} new lives were acknowledged, and {walked.replays} were given"
    if not wish.cancelled or not clocks.comparable:
        return
    accepted = wish.cancelled - clocks.to_monotonic
    for change in story.transitions:
        if change.old == RUNNING and change.new == QUEUED and change.began > accepted + _CANCEL_US:
            yield (
                "illegal_transition",
                f"seq {change.seq}: back in the queue, though its cancel had been accepted",
            )
            return


# --- what is added up ----------------------------------------------------------------------------------------


def _note_times(story: Story, wish: Asked, clocks: Clocks, sums: Sums) -> None:
    """The first claim goes into the line of its queue and band, every claim of a quick job into the pace."""
    changes, row = story.transitions, story.row
    assert row is not None
    visible = wish.acknowledged - clocks.to_monotonic
    ready, placed, first = 0, (0, 0), True
    for change in changes:
        new = change.new
        if new == QUEUED:
            ready = max(change.at, change.run_at, visible)
        elif new == MARKED:
            placed = placed if any(placed) else (change.began, change.at)
        elif new == RUNNING:
            if first:
                marked, claimed = any(placed), (change.began, change.at)
                _line(sums, row.queue, row.priority).add(
                    row.priority,
                    change.run_at,
                    ready,
                    placed if marked else claimed,
                    claimed,
                    wish.hinted and not marked,
                )
                first = False
            if row.queue in QUICK_QUEUES:
                sums.pace.add(ready, change.at)
        elif new == CANCELLED and first:
            return


def _line(sums: Sums, queue: str, priority: int) -> Line:
    key = (queue, _BANDS.get(priority) or band_of(priority))
    found = sums.lines.get(key)
    if found is None:
        found = sums.lines[key] = Line()
    return found


def _note_recovery(story: Story, walked: Walk, around: Around, sums: Sums) -> None:
    """Whether a job's handler was started again, and how long its process had been dead when the job was given back."""
    runs = checks_runs.executions(story.handlers)
    again = False
    for place, run in enumerate(runs):
        claim = walked.claims.get(run.token)
        if claim is None or not claim.rescued or claim.left is None:
            continue
        again = again or place + 1 < len(runs)
        death = around.seen.death_after(run.pid, run.start)
        if death is not None and around.clocks.comparable:
            taken = claim.left.at + around.clocks.to_monotonic
            sums.slowest_recovery = max(sums.slowest_recovery, taken - death)
    sums.re_executed += again
