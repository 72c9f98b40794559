"""The executions of one job, as its handlers recorded them, against its claims: who ran without one, twice, or beside another. Pure."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

from pmqd.chaos.checks_history import (
    COMPLETED,
    EPOCH_US,
    FAILED,
    QUEUED,
    Story,
    Surroundings,
)
from pmqd.chaos.checks_walk import MOST_INTERRUPTIONS, Claim, Problem, Walk

DONE: Final = frozenset({"ok", "kept"})
"""Ends after which a job may be completed; `kept` is recorded inside the transaction that does it."""
SEEN_DEAD_US: Final = 2_000_000
"""How late a death may be noted on a busy machine: by so much a rescue may come before it."""
NEVER: Final = 2**62


class Execution(NamedTuple):
    """One run of user code; times in microseconds, of the monotonic and of the machine's clock."""

    token: bytes
    attempt: int
    pid: int
    start: int
    start_wall: int
    end: int | None
    end_wall: int
    how: str


@dataclass(frozen=True)
class Clocks:
    """How the clocks of handlers, of the database and the monotonic one go together.

    Attributes:
        to_database: microseconds to add to the handlers' clock (since 1970) to get the database's (since 2000).
        to_monotonic: microseconds to add to the database's clock to get the monotonic one.
        slack: how far a comparison between two clocks may be off; negative: they cannot be compared.
    """

    to_database: int = -EPOCH_US
    to_monotonic: int = 0
    slack: int = 2_000

    @property
    def comparable(self) -> bool:
        """Whether times of different clocks may be compared at all."""
        return self.slack >= 0


@dataclass(frozen=True)
class Around:
    """What a job's check needs to know of the world.

    Attributes:
        seen: deaths, faults, pauses.
        clocks: how to compare times.
        lost_lease: asked for a job and the start of an attempt: did its instance's lease run out, with a fault to explain it?
    """

    seen: Surroundings
    clocks: Clocks
    lost_lease: Callable[[bytes], bool]


def executions(lines: Sequence[bytes]) -> list[Execution]:
    """The runs that a job's handler lines tell of, in the order of their starts."""
    found: list[Execution] = []
    for line in lines:
        words = line.split()
        token, pid = bytes.fromhex(words[3].replace(b"-", b"").decode()), int(words[4])
        moment, wall = int(words[5]) // 1000, int(words[6])
        if words[0] == b"S":
            found.append(Execution(token, int(words[2]), pid, moment, wall, None, 0, ""))
            continue
        for place in range(len(found) - 1, -1, -1):
            run = found[place]
            if run.token == token and run.pid == pid and run.end is None:
                found[place] = run._replace(end=moment, end_wall=wall, how=words[7].decode())
                break
    return sorted(found, key=lambda run: run.start)


def problems(story: Story, walked: Walk, around: Around) -> Iterator[Problem]:
    """What a job's executions have done that they may not."""
    runs = executions(story.handlers)
    yield from _unclaimed(walked, runs, around)
    for claim in walked.claims.values():
        mine = [run for run in runs if run.token == claim.token]
        yield from _settled_by_its_own(claim, mine, around)
        yield from _given_back_rightly(claim, mine)
        yield from _rescued_rightly(story, claim, mine, around)
    yield from _overlaps(story, walked, runs, around)
    yield from _done_twice(story, walked, runs, around)


def _unclaimed(walked: Walk, runs: Sequence[Execution], around: Around) -> Iterator[Problem]:
    """User code runs under a claim, after it, once."""
    clocks = around.clocks
    started: set[bytes] = set()
    for run in runs:
        claim = walked.claims.get(run.token)
        if claim is None:
            yield "early", f"user code started under {run.token.hex()[:8]}, a claim that was never committed"
        elif clocks.comparable and run.start_wall + clocks.to_database + clocks.slack < claim.made.began:
            yield "early", f"user code started before its claim (seq {claim.made.seq})"
        if run.token in started:
            yield "over_attempted", f"user code started twice under the claim {run.token.hex()[:8]}"
        started.add(run.token)


def _settled_by_its_own(claim: Claim, runs: Sequence[Execution], around: Around) -> Iterator[Problem]:
    """Whoever completes or fails a job, or asks for a retry, has run it to its end under this very claim."""
    left, clocks = claim.left, around.clocks
    if left is None or not claim.settled or left.new not in (COMPLETED, FAILED, QUEUED) or claim.refunded:
        return
    if left.new == QUEUED and left.interruptions >= MOST_INTERRUPTIONS:
        return  # one interruption too many is charged, and needs no end of the handler
    ended = [run for run in runs if run.end is not None and (left.new != COMPLETED or run.how in DONE)]
    if clocks.comparable:
        ended = [run for run in ended if run.end_wall + clocks.to_database <= left.at + clocks.slack]
    if not ended:
        yield (
            "stale_settled",
            f"seq {left.seq}: settled while no handler had ended so under the claim {claim.token.hex()[:8]}",
        )


def _given_back_rightly(claim: Claim, runs: Sequence[Execution]) -> Iterator[Problem]:
    """An attempt whose user code started is given back by a snooze, or as an interruption, or not at all."""
    if not claim.refunded or claim.interrupted or not runs:
        return
    if not (claim.settled and any(run.how == "snooze" for run in runs)):
        assert claim.left is not None
        yield (
            "over_attempted",
            f"seq {claim.left.seq}: given back as if user code had not started, and it had",
        )


def _rescued_rightly(
    story: Story, claim: Claim, runs: Sequence[Execution], around: Around
) -> Iterator[Problem]:
    """Nothing is taken from a process that lives, unless its lease ran out."""
    if not claim.rescued or not around.clocks.comparable:
        return
    assert claim.left is not None
    taken = claim.left.at + around.clocks.to_monotonic
    for run in runs:
        death = around.seen.death_after(run.pid, run.start)
        alive = (
            around.seen.last_sign.get(run.pid, 0) > taken if death is None else death > taken + SEEN_DEAD_US
        )
        if alive and not around.lost_lease(story.job):
            yield "false_rescue", f"seq {claim.left.seq}: taken from process {run.pid}, which lived"


def _overlaps(story: Story, walked: Walk, runs: Sequence[Execution], around: Around) -> Iterator[Problem]:
    """No two runs of a job at one time, as far as their processes ran."""
    for place, first in enumerate(runs):
        closed = _closed(first, walked, around, runs)
        for second in runs[place + 1 :]:
            if second.start >= closed:
                break
            until = min(closed, _closed(second, walked, around, runs))
            if _both_ran(first, second, until, around.seen):
                name = "overlapped_after_lost_lease" if around.lost_lease(story.job) else "overlapped"
                text = f"process {first.pid} ran it until {_text(closed)}, process {second.pid} from {second.start}"
                yield name, text


def _text(moment: int) -> str:
    return "the end" if moment == NEVER else str(moment)


def _closed(run: Execution, walked: Walk, around: Around, runs: Sequence[Execution]) -> int:
    """When a run was over: its handler said so, or its process died, or its own settle proves it."""
    if run.end is not None:
        return run.end
    found = []
    claim = walked.claims.get(run.token)
    if claim is not None and claim.settled and claim.left is not None and around.clocks.comparable:
        found.append(claim.left.at + around.clocks.to_monotonic)
    death = around.seen.death_after(run.pid, run.start)
    if death is not None:
        # It is noted after the fact. A line that the process wrote itself is the later proof of life.
        later = [other.start for other in runs if other.start > run.start and other.token != run.token]
        signs = around.seen.last_sign.get(run.pid, 0)
        near = [start for start in later if signs <= start <= death <= start + SEEN_DEAD_US]
        found.append(min(near, default=death))
    return min(found, default=NEVER)


def _both_ran(first: Execution, second: Execution, until: int, seen: Surroundings) -> bool:
    """Whether some moment from the second's start on is in no pause of either process."""
    at = second.start
    pauses = sorted(seen.pauses.get(first.pid, []) + seen.pauses.get(second.pid, []))
    for start, end in pauses:
        if start > at:
            break
        at = max(at, end)
    return at < until


def _done_twice(story: Story, walked: Walk, runs: Sequence[Execution], around: Around) -> Iterator[Problem]:
    """A handler that came to its end is not run again in that life, unless its process died before anybody knew."""
    done = [run for run in runs if run.how == "ok" and run.token in walked.claims]
    for first, second in pairwise(done):
        claim = walked.claims[first.token]
        if claim.life != walked.claims[second.token].life:
            continue
        death = around.seen.death_after(first.pid, first.start)
        died = death is not None and death <= second.start + SEEN_DEAD_US
        if not died and not around.lost_lease(story.job):
            yield (
                "doubled",
                f"handlers of processes {first.pid} and {second.pid} both came to an end in one life",
            )
