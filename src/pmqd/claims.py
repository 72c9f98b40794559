"""What a worker has claimed: its tokens, which of its claims are open, in doubt or over, and rows that cannot be claimed.

A claim whose answer was lost may be committed even after somebody asked for it (its backend lives on for a while), so it
is asked for several times; one that commits later still is found by maintenance, which sees that no worker knows of it.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID, uuid4

from pmqd.errors import StoreUnavailable
from pmqd.job import Claimed, Outcome
from pmqd.reach import Reach
from pmqd.slot import Slot
from pmqd.store import Best, StatementError, Store
from pmqd.store_rows import Order, stretches
from pmqd.unwritable import Unwritable

log = logging.getLogger(__name__)

Wanted = list[UUID] | Best
"""Jobs to claim: by their ids, or the best ones."""

ASK_EVERY_SECONDS: Final = 1.0
ASK_FOR_SECONDS: Final = 15.0  # longer than a lost statement may run: statement_timeout is 5 s


@dataclass(frozen=True, slots=True)
class Claimant:
    """Who claims.

    Attributes:
        store: PostgreSQL.
        slot: the arena's record of this worker, which knows its tokens.
        worker_id: its name.
        instance_id: for which instance, at the moment.
        checkpoint: the named crash points.
    """

    store: Store
    slot: Slot
    worker_id: str
    instance_id: Callable[[], UUID]
    checkpoint: Callable[[str], None]


@dataclass(slots=True)
class _InDoubt:
    """A claim whose commit was not heard of; asked for by its token until `until` (monotonic seconds)."""

    token: UUID
    until: float
    asked: float
    ask_at: float = 0.0


class Claims:
    """The claims of one worker. Every method that speaks to PostgreSQL may raise `StoreUnavailable`.

    Attributes:
        held: claim token -> the numbers of the jobs that are not settled, and which attempt it is.
        sent: when the last claim was about to be sent (monotonic seconds).
        unwritable: jobs that PostgreSQL refuses to have written.
    """

    def __init__(self, claimant: Claimant, ask_for_seconds: float = ASK_FOR_SECONDS) -> None:
        """Takes who claims, and how long a claim whose answer was lost is asked for."""
        self._who = claimant
        self._ask_for_seconds = ask_for_seconds
        self.held: dict[UUID, dict[int, int]] = {}
        self.sent = 0.0
        self.unwritable = Unwritable()
        self._reach = Reach()
        self._closed: list[UUID] = []
        self._in_doubt: list[_InDoubt] = []

    @property
    def closed(self) -> list[UUID]:
        """Claims that are over, which PostgreSQL was not told."""
        return self._closed

    @property
    def in_doubt(self) -> list[UUID]:
        """Claims whose answer was lost."""
        return [claim.token for claim in self._in_doubt]

    def first_asked(self) -> float:
        """None of the claims in doubt was sent before this (monotonic seconds)."""
        return min((claim.asked for claim in self._in_doubt), default=0.0)

    def worth_it(self, ids: Sequence[UUID]) -> list[UUID]:
        """The jobs to claim, without those that could not be claimed a moment ago; one that is named twice is won once."""
        spared = set(self.unwritable.current(time.monotonic()))
        return [job_id for job_id in ids if job_id not in spared] if spared else list(ids)

    def best(
        self, queues: Sequence[str], limit: int, order: Order, *, marked: bool, hinted: Sequence[UUID] = ()
    ) -> Wanted:
        """What to claim without hints: up to `limit` of the best jobs of these queues, also of the marked ones or not; and some by hints."""
        spared = self.unwritable.current(time.monotonic())
        if (
            spared
        ):  # some row cannot be claimed: it would be the best one each time, and nobody would get past it
            return [*self.worth_it(hinted), *self._who.store.candidates(queues, limit, [*spared, *hinted])]
        wanted = Best(stretches(queues, order), limit, marked, hinted=hinted)
        return self._reach.behind(wanted, time.monotonic())

    def claim(
        self, outcomes: list[Outcome], closed: list[UUID], wanted: Wanted
    ) -> tuple[dict[UUID, str], list[Claimed]]:
        """Claims, and settles in the same transaction what is given."""
        who, statuses = self._who, dict[UUID, str]()
        with self._new_token() as token:
            given: Any = {"token": token, "worker_id": who.worker_id, "instance_id": who.instance_id()}
            if outcomes or closed:
                statuses, claimed = who.store.settle_and_claim(outcomes, closed, wanted, **given)
            else:
                claimed = who.store.claim(wanted, **given)
        if isinstance(wanted, Best):
            self._reach.won(wanted, claimed)
        return statuses, self._won(token, claimed)

    def claim_apart(self, wanted: Wanted, claimed: list[Claimed]) -> None:
        """Claims in halves, and halves of these, until the rows that cannot be claimed stand alone: they are left as they are."""
        if isinstance(wanted, Best):
            best = self._who.store.candidates(wanted.queues, wanted.limit, wanted.hinted)
            wanted = [*wanted.hinted, *best]
        if not wanted:
            return
        try:
            claimed += self.claim([], [], wanted)[1]
        except StatementError as error:
            if len(wanted) == 1:
                self.unwritable.add(wanted[0], "the job cannot be claimed", error, time.monotonic())
                return
            self.claim_apart(wanted[: len(wanted) // 2], claimed)
            self.claim_apart(wanted[len(wanted) // 2 :], claimed)

    def read_back(self, now: float) -> list[Claimed]:
        """Asks for what is in doubt, as often as it may still appear."""
        found: list[Claimed] = []
        for claim in [each for each in self._in_doubt if each.ask_at <= now]:
            try:
                claimed = self._who.store.claimed(claim.token)
            except StoreUnavailable:
                if not found:
                    raise
                break  # what has been found is this worker's, and nobody would ask for it again
            claim.ask_at = now + ASK_EVERY_SECONDS
            if claimed or now >= claim.until:
                self._in_doubt.remove(claim)
                found += self._won(claim.token, claimed)
        return found

    def over_with(self, outcomes: Sequence[Outcome]) -> list[UUID]:
        """Claims of which nothing is left once these outcomes are settled, and those that are over."""
        counts = [(token, len(jobs)) for token, jobs in _by_token(outcomes)]
        return [*self._closed, *(token for token, count in counts if len(self.held.get(token, ())) <= count)]

    def told(self) -> None:
        """PostgreSQL knows all claims that are over."""
        self._closed = []

    def let_go(self, outcomes: Sequence[Outcome], told: Sequence[UUID] = ()) -> None:
        """These jobs are held no more; with the last one of a token the claim is over, which PostgreSQL is told unless it was."""
        for token, jobs in _by_token(outcomes):
            left = self.held.get(token, {})
            for job in jobs:
                left.pop(job, None)
            if not left and self.held.pop(token, None) is not None:
                self._who.slot.drop_token(token)
                if token not in told:
                    self._closed.append(token)

    @contextlib.contextmanager
    def _new_token(self) -> Iterator[UUID]:
        """A token, and a claim under it: with its answer lost it is in doubt; refused, it is nothing."""
        token = uuid4()
        self._who.slot.add_token(token)
        self.sent = time.monotonic()
        self._who.checkpoint("worker.claiming")
        try:
            yield token
        except StoreUnavailable:
            until = time.monotonic() + self._ask_for_seconds
            self._in_doubt.append(_InDoubt(token, until, self.sent))
            raise
        except BaseException:
            self._who.slot.drop_token(token)
            raise
        self._who.checkpoint("worker.claimed")

    def _won(self, token: UUID, claimed: list[Claimed]) -> list[Claimed]:
        if claimed:
            held = self.held[token] = {each.id.int: each.attempt_count for each in claimed}
            if len(held) < len(claimed):  # it cannot be; a job that runs twice is worse than a look at it
                log.error("a claim named %d of its jobs twice; each runs once", len(claimed) - len(held))
                claimed = list({each.id.int: each for each in claimed}.values())
        else:
            self._who.slot.drop_token(token)
        return claimed


def _by_token(outcomes: Sequence[Outcome]) -> list[tuple[UUID, list[int]]]:
    """The numbers of the jobs under each token. UUIDs themselves are slow as keys: their hash is computed in Python."""
    tokens: dict[int, tuple[UUID, list[int]]] = {}
    for outcome in outcomes:
        number = outcome.token.int
        if number not in tokens:
            tokens[number] = outcome.token, []
        tokens[number][1].append(outcome.job_id.int)
    return list(tokens.values())
