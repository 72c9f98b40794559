"""The way of one job through its states, as its transitions tell it: what may follow what, under which token, at what charge. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from pmqd.chaos.checks_history import (
    CANCELLED,
    COMPLETED,
    MARKED,
    NAMES,
    NONE,
    NOTHING,
    QUEUED,
    RUNNING,
    TERMINAL,
    Transition,
)

MOST_INTERRUPTIONS: Final = 5

Problem = tuple[str, str]
"""Which invariant, and what is wrong."""


@dataclass(slots=True)
class Claim:
    """One claim, and how the job left it.

    Attributes:
        token: its own.
        life: 0, and one more with each replay.
        made: the transition that made it.
        left: the one that ended it; None: it still runs.
        attempt_before: charged attempts before it.
    """

    token: bytes
    life: int
    made: Transition
    left: Transition | None = None

    @property
    def settled(self) -> bool:
        """By its owner: a settle leaves the token where it is."""
        return self.left is not None and self.left.new_token == self.token

    @property
    def rescued(self) -> bool:
        """By somebody else: a rescue takes the token away."""
        return self.left is not None and self.left.new_token == NONE

    @property
    def refunded(self) -> bool:
        """The attempt was given back."""
        return self.left is not None and self.left.attempt < self.made.attempt

    @property
    def interrupted(self) -> bool:
        """It was given back as an interruption."""
        return self.refunded and self.left is not None and self.left.interruptions > self.made.interruptions


@dataclass(slots=True)
class Walk:
    """What a job's transitions say.

    Attributes:
        claims: by token, in order.
        replays: how many new lives it was given.
        problems: what may not be.
    """

    claims: dict[bytes, Claim] = field(default_factory=dict)
    replays: int = 0
    problems: list[Problem] = field(default_factory=list)


def walk(changes: Sequence[Transition]) -> Walk:
    """Follows a job through its transitions."""
    found = Walk()
    before: Transition | None = None
    for change in changes:
        found.problems += _chain(before, change)
        found.problems += _step(found, before, change)
        found.problems += _bounds(change)
        before = change
    return found


def _chain(before: Transition | None, change: Transition) -> Iterator[Problem]:
    """Each transition begins where the one before it ended."""
    if before is None:
        if change.old != NOTHING:
            yield "illegal_transition", f"its first transition is from {NAMES[change.old]}"
        return
    if (before.new, before.new_token) != (change.old, change.old_token):
        yield "illegal_transition", f"seq {before.seq} to {change.seq}: something changed the row unseen"
    if before.max_attempts != change.max_attempts:
        yield (
            "illegal_transition",
            f"seq {change.seq}: max_attempts {before.max_attempts} -> {change.max_attempts}",
        )


def _step(found: Walk, before: Transition | None, change: Transition) -> Iterator[Problem]:
    old, new = change.old, change.new
    if old == NOTHING:
        yield from _enqueued(change, before)
    elif old == COMPLETED:
        yield "resurrected", f"seq {change.seq}: completed -> {NAMES[new]}"
    elif old in TERMINAL:
        yield from _replayed(found, change)
    elif new == RUNNING:
        yield from _claimed(found, before, change)
    elif old == RUNNING:
        yield from _left(found, before, change)
    elif new == CANCELLED or (new == MARKED and old == QUEUED) or (new == QUEUED and old == QUEUED):
        if before is not None and _charge(before) != _charge(change):
            yield "illegal_transition", f"seq {change.seq}: {NAMES[old]} -> {NAMES[new]} changed the attempts"
        if change.new_token not in (NONE, change.old_token):
            yield "illegal_transition", f"seq {change.seq}: {NAMES[old]} -> {NAMES[new]} brought a token"
    else:
        yield "illegal_transition", f"seq {change.seq}: {NAMES[old]} -> {NAMES[new]}"


def _charge(change: Transition) -> tuple[int, int]:
    return change.attempt, change.interruptions


def _enqueued(change: Transition, before: Transition | None) -> Iterator[Problem]:
    if before is not None:
        yield "doubled", f"seq {change.seq}: the row was inserted a second time"
    elif (change.new, change.new_token, *_charge(change)) != (QUEUED, NONE, 0, 0):
        yield "illegal_transition", f"seq {change.seq}: inserted as {change}"


def _replayed(found: Walk, change: Transition) -> Iterator[Problem]:
    if change.new in TERMINAL:
        yield "doubled", f"seq {change.seq}: ended a second time, {NAMES[change.old]} -> {NAMES[change.new]}"
    elif change.new != QUEUED:
        yield "illegal_transition", f"seq {change.seq}: {NAMES[change.old]} -> {NAMES[change.new]}"
    else:
        found.replays += 1
        if (change.new_token, *_charge(change)) != (NONE, 0, 0):
            yield "illegal_transition", f"seq {change.seq}: a new life that does not begin anew"


def _claimed(found: Walk, before: Transition | None, change: Transition) -> Iterator[Problem]:
    token = change.new_token
    if change.old == RUNNING:
        yield "illegal_transition", f"seq {change.seq}: claimed while it ran"
    if token == NONE or token in found.claims:
        yield "illegal_transition", f"seq {change.seq}: a claim without a fresh token"
    if change.began < change.run_at:
        yield "early", f"seq {change.seq}: claimed {(change.run_at - change.began) / 1e6:.6f} s before run_at"
    if before is not None and _charge(change) != (before.attempt + 1, before.interruptions):
        yield "illegal_transition", f"seq {change.seq}: the claim did not charge one attempt"
    found.claims.setdefault(token, Claim(token, found.replays, change))


def _left(found: Walk, before: Transition | None, change: Transition) -> Iterator[Problem]:
    claim = found.claims.get(change.old_token)
    if claim is not None and claim.left is None:
        claim.left = change
    if change.new_token not in (NONE, change.old_token):
        yield "stale_settled", f"seq {change.seq}: left under another token than it was claimed with"
    if change.new == MARKED:
        yield "illegal_transition", f"seq {change.seq}: running -> migrated_to_redis"
    if change.new == COMPLETED and change.new_token == NONE:
        yield "illegal_transition", f"seq {change.seq}: completed by a rescue"
    if before is not None:
        yield from _charged(before, change)


def _charged(before: Transition, change: Transition) -> Iterator[Problem]:
    """What leaving may do to the attempts: nothing, give one back, or count it as an interruption."""
    attempt, interruptions = _charge(before)
    allowed = {(attempt, interruptions)}
    if change.new in (QUEUED, CANCELLED):
        allowed |= {(attempt - 1, interruptions), (attempt - 1, interruptions + 1)}
    if _charge(change) not in allowed:
        text = f"{attempt}/{interruptions} -> {change.attempt}/{change.interruptions}"
        yield "illegal_transition", f"seq {change.seq}: attempts/interruptions {text}"


def _bounds(change: Transition) -> Iterator[Problem]:
    if change.attempt > change.max_attempts:
        yield "over_attempted", f"seq {change.seq}: attempt {change.attempt} of {change.max_attempts}"
    if change.interruptions > MOST_INTERRUPTIONS:
        yield "over_attempted", f"seq {change.seq}: {change.interruptions} interruptions"
    if change.attempt < 0:
        yield "illegal_transition", f"seq {change.seq}: attempt {change.attempt}"
