"""What a worker owes PostgreSQL and what it holds there: settles, claims, and what is in doubt.

A lost connection leaves two questions: was the settle committed, was the claim? Both are asked again by token on
the next connection. A settle may even be committed *after* that question (its backend lives on for a while), so a
refused one that had been in doubt is asked for once more. The claims themselves are in claims.py.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final
from uuid import UUID

from pmqd import metrics
from pmqd.claims import ASK_EVERY_SECONDS, ASK_FOR_SECONDS, Claimant, Claims, Wanted
from pmqd.desk import Desk, Finished
from pmqd.errors import StoreUnavailable
from pmqd.job import Action, Claimed, Outcome, Status, uuid_of
from pmqd.retry import harmless
from pmqd.slot import Receipt, Slot
from pmqd.store import StatementError, Store
from pmqd.store_rows import Order

log = logging.getLogger(__name__)

_MEET_SECONDS: Final = 30.0
_STUCK_SECONDS: Final = 10.0
_STATUS_OF: Final = {
    Action.COMPLETE: Status.COMPLETED,
    Action.FAIL: Status.FAILED,
    Action.CANCEL: Status.CANCELLED,
}


@dataclass(slots=True)
class Answer:
    """What one exchange with PostgreSQL brought.

    Attributes:
        settled: what counts, with the status that each row has now.
        claimed: jobs won.
        asked: when the first of the claims was sent, or before that (monotonic seconds).
    """

    settled: list[tuple[Finished, str]] = field(default_factory=list)
    claimed: list[Claimed] = field(default_factory=list)
    asked: float = 0.0


class Ledger:
    """The clerk's account with PostgreSQL. Every method that speaks to it may raise `StoreUnavailable`."""

    def __init__(
        self,
        store: Store,
        desk: Desk,
        slot: Slot,
        worker_id: str,
        instance_id: Callable[[], UUID],
        checkpoint: Callable[[str], None],
        *,
        ask_for_seconds: float = ASK_FOR_SECONDS,
    ) -> None:
        """Takes the stores and records.

        Args:
            store: PostgreSQL.
            desk: learns what is owed.
            slot: the arena's record of this worker.
            worker_id: who claims.
            instance_id: for which instance, at the moment.
            checkpoint: the named crash points.
            ask_for_seconds: how long a claim whose answer was lost is asked for. One that commits later still is found by
                maintenance, which sees that no worker knows of it.
        """
        self._store = store
        self._desk = desk
        self._slot = slot
        self._worker_id = worker_id
        self._instance_id = instance_id
        self._checkpoint = checkpoint
        self._claims = Claims(Claimant(store, slot, worker_id, instance_id, checkpoint), ask_for_seconds)
        self._owed: list[Finished] = []
        self._doubtful: list[Finished] = []
        self._asked: set[tuple[UUID, UUID]] = set()  # outcomes owed whose settle was in doubt before
        self._stuck: list[Finished] = []  # what cannot be settled in any way, now
        self._stuck_at = 0.0
        self._life: tuple[int, int] | None = None
        self._meet_until = self._meet_at = 0.0

    @property
    def sent(self) -> float:
        """When the last claim was about to be sent (monotonic seconds)."""
        return self._claims.sent

    @property
    def owes(self) -> bool:
        """Whether a settle is outstanding: then nothing new is claimed on its own."""
        return bool(self._owed or self._doubtful)

    @property
    def in_doubt(self) -> bool:
        """Whether something must be read back first."""
        return bool(self._doubtful)

    @property
    def closing(self) -> bool:
        """Whether claims are over that PostgreSQL still lists; nothing hangs on when it is told."""
        return bool(self._claims.closed)

    def oldest(self) -> float | None:
        """When the first job ended whose settle is owed (monotonic seconds)."""
        return self._owed[0].ended if self._owed else None

    def owe(self, finished: Sequence[Finished]) -> list[tuple[Finished, str]]:
        """Takes what has ended; gives back what is settled already, by the handler itself."""
        done = []
        for each in finished:
            if each.acknowledged:
                done.append((each, _status(each.outcome)))
            elif each.doubt is not None:
                self._doubtful.append(each)
            else:
                self._owed.append(each)
        return self._acknowledge(done) if done else []

    def saved(self) -> tuple[list[Outcome], list[UUID]]:
        """All settles that PostgreSQL has not acknowledged, and the claims that are over with them.

        They count as in doubt from now on: somebody else may apply what is written down.
        """
        self._doubtful, self._owed = [*self._doubtful, *self._owed], []
        outcomes = [each.outcome for each in self._doubtful]
        return outcomes, self._claims.over_with(outcomes)

    def settle(self) -> Answer:
        """Settles what is owed."""
        return self._exchange([])

    def claim(self, ids: Sequence[UUID]) -> Answer:
        """Claims jobs, and settles what is owed with the same commit."""
        return self._exchange(self._claims.worth_it(ids))

    def steal(self, queues: Sequence[str], limit: int, order: Order, *, marked: bool = True) -> Answer:
        """Claims up to `limit` of the best jobs of these queues without any hint, and settles what is owed with the same commit.

        Args:
            queues: most important first.
            limit: jobs at most.
            order: of the pool.
            marked: also those that are marked; without them no hint becomes useless.
        """
        return self._exchange(self._claims.best(queues, limit, order, marked=marked))

    def read_back(self, now: float) -> Answer:
        """Asks for what is in doubt: settles now, claims as often as they may still appear."""
        self._meet(now)
        answer = Answer(asked=self._claims.first_asked())
        if self._doubtful:
            answer.settled.extend(self._read_settles())
        answer.settled.extend(self._settle_stuck(now))
        answer.claimed.extend(self._claims.read_back(now))
        return answer

    def _meet(self, now: float) -> None:
        """Looks whether this is the PostgreSQL that the claims were made in.

        A standby that was promoted may lack the last commits. What this worker holds by them it takes again, before anybody may
        claim, and what it has settled by them is given back. Repeated for a lease: its instance may have to sign on again first.
        """
        life = self._store.meet()
        if life != self._life:
            known, self._life = self._life, life
            if known is not None:
                self._meet_until = now + _MEET_SECONDS
        if now >= self._meet_until or now < self._meet_at:
            return
        self._meet_at = now + ASK_EVERY_SECONDS
        taken = []
        for token, attempts in self._claims.held.items():
            jobs = {uuid_of(number): attempt for number, attempt in attempts.items()}
            taken += self._store.take_again(
                token, jobs, worker_id=self._worker_id, instance_id=self._instance_id()
            )
        doubtful = self._claims.in_doubt
        cause = "its settle was lost when a standby of PostgreSQL was promoted"
        lost = self._store.give_back_forgotten(self._worker_id, self._claims.held, doubtful, cause)
        metrics.count_rescued(lost)
        if taken or lost:
            text = "after a failover of PostgreSQL: %d jobs taken again, %d whose settle was lost given back"
            log.warning(text, len(taken), len(lost))

    def _read_settles(self) -> list[tuple[Finished, str]]:
        doubtful = self._doubtful
        found = self._store.settled_ids([each.doubt or each.outcome for each in doubtful])
        settled, again = [], []
        for each in doubtful:
            asked = each.doubt or each.outcome
            if _key(asked) in found:
                settled.append((replace(each, outcome=asked), found[_key(asked)]))
            else:
                again.append(replace(each, doubt=None))
        self._owed = again + self._owed
        self._asked |= {_key(each.outcome) for each in again}
        self._doubtful = []
        return self._acknowledge(settled)

    def _exchange(self, wanted: Wanted) -> Answer:
        answer = Answer()
        try:
            while len(batch := _once_each(self._owed)) < len(self._owed):
                answer.settled.extend(
                    self._settle_or_singly(batch)
                )  # two of one job: under two tokens, so one by one
            self._settle_and_claim(wanted, answer)
        except StoreUnavailable:
            self._doubtful, self._owed = [*self._doubtful, *self._owed], []
            if not (answer.claimed or answer.settled):
                raise  # else what was won is this worker's, and nobody would ask for it again; the next call finds out
        return answer

    def _settle_and_claim(self, wanted: Wanted, answer: Answer) -> None:
        """All in one transaction; where PostgreSQL refuses some row, apart, so that one row costs no other."""
        answer.asked = time.monotonic()
        try:
            settled, claimed = self._send(self._owed, wanted)
        except StatementError as error:
            if self._owed:
                log.warning("a settle of %d jobs was refused, tried again: %s", len(self._owed), error)
                answer.settled.extend(self._settle_or_singly(self._owed))
            self._claims.claim_apart(wanted, answer.claimed)
        else:
            answer.settled.extend(settled)
            answer.claimed.extend(claimed)

    def _settle_or_singly(self, batch: list[Finished]) -> list[tuple[Finished, str]]:
        """Settles the first of what is owed; one outcome that PostgreSQL refuses must not keep the others from being settled."""
        try:
            return self._send(batch, [])[0]
        except StatementError:
            return [each for _ in range(len(batch)) for each in self._settle_one()]

    def _settle_one(self) -> list[tuple[Finished, str]]:
        """The first of what is owed: as it ended; else as failed, with the reason; else it is kept and tried again.

        Its claim stays open meanwhile, so it does not run again.
        """
        each = self._owed[0]
        try:
            return self._send([each], [])[0]
        except StatementError as error:
            text = harmless(f"the job's end could not be written: {type(error).__name__}: {error}", 2048)
        failed = replace(each.outcome, action=Action.FAIL, result=None, error=text)
        try:
            return self._send([replace(each, outcome=failed)], [])[0]
        except StatementError as error:
            what = "the job's end cannot be written"
            self._claims.unwritable.add(each.outcome.job_id, what, error, time.monotonic())
            self._stuck.append(self._owed.pop(0))
            return []

    def _settle_stuck(self, now: float) -> list[tuple[Finished, str]]:
        if not self._stuck or now < self._stuck_at:
            return []
        self._stuck_at = now + _STUCK_SECONDS
        stuck, self._stuck = self._stuck, []
        self._owed = stuck + self._owed  # if the connection is lost, they are in doubt with the rest
        try:
            return [each for _ in range(len(stuck)) for each in self._settle_one()]
        except StoreUnavailable:
            self._doubtful, self._owed = [*self._doubtful, *self._owed], []
            return []

    def _send(self, owed: list[Finished], wanted: Wanted) -> tuple[list[tuple[Finished, str]], list[Claimed]]:
        """One statement, or two in one transaction: the first of what is owed, and the claim."""
        outcomes = [each.outcome for each in owed]
        closed = self._claims.over_with(outcomes)
        if owed or not wanted:
            self._checkpoint("worker.settling")
        if not wanted:
            statuses = self._store.settle(outcomes, closed)
            claimed: list[Claimed] = []
        else:
            statuses, claimed = self._claims.claim(outcomes, closed, wanted)
        self._checkpoint("worker.settled")
        self._owed = self._owed[len(owed) :]
        self._claims.told()
        return self._answered(owed, closed, statuses), claimed

    def _answered(
        self, owed: list[Finished], closed: list[UUID], statuses: dict[UUID, str]
    ) -> list[tuple[Finished, str]]:
        if not owed and not closed:
            self._tell_desk()
            return []  # a claim alone
        found = [(each, statuses.get(each.outcome.job_id)) for each in owed]
        settled = [(each, status) for each, status in found if status is not None]
        stale = []
        if len(settled) < len(owed):
            refused = [each for each, status in found if status is None]
            known = self._sent_before(refused)
            settled += [(each, known[_key(each.outcome)]) for each in refused if _key(each.outcome) in known]
            stale = [
                each for each in refused if _key(each.outcome) not in known and each not in self._doubtful
            ]
        return self._acknowledge(settled, stale, closed)

    def _sent_before(self, refused: list[Finished]) -> dict[tuple[UUID, UUID], str]:
        """Of settles that met no row: those of which an earlier sending came through after all; all others were taken from us."""
        asked = [each for each in refused if _key(each.outcome) in self._asked]
        if not asked:
            return {}
        try:
            return self._store.settled_ids([each.outcome for each in asked])
        except StoreUnavailable:
            self._doubtful += asked  # it is asked again
            return {}

    def _acknowledge(
        self,
        settled: Sequence[tuple[Finished, str]],
        stale: Sequence[Finished] = (),
        closed: Sequence[UUID] = (),
    ) -> list[tuple[Finished, str]]:
        """Counts what PostgreSQL has, and what it refused, and forgets both: the notes in the arena go with the count."""
        over = [*(each for each, _ in settled), *stale]
        places = [place for each in over for place in each.places]
        receipt = Receipt(self._slot, places, self._counting, self._counted)
        metrics.post(
            metrics.Count().settled((each.outcome, status) for each, status in settled).stale(len(stale)),
            receipt,
        )
        for each in stale:
            log.warning(
                "job %s was taken from this worker before it settled; its result is dropped",
                each.outcome.job_id,
            )
        self._claims.let_go([each.outcome for each in over], told=closed)
        if self._asked:
            self._asked.difference_update(_key(each.outcome) for each in over)
        self._tell_desk()
        return list(settled)

    def _counting(self) -> None:
        self._checkpoint("worker.counting")

    def _counted(self) -> None:
        self._checkpoint("worker.counted")

    def _tell_desk(self) -> None:
        # What is given back unstarted is not among what a crash of the next job would cost.
        owed = any(each.outcome.action is not Action.RELEASE for each in (*self._doubtful, *self._owed))
        self._desk.settled(owed=owed)


def _status(outcome: Outcome) -> str:
    """What a settle makes of its row, as far as its sender can know."""
    return str(_STATUS_OF.get(outcome.action, Status.QUEUED))


def _key(outcome: Outcome) -> tuple[UUID, UUID]:
    """What a settle is known by: a job may have been claimed twice in a row by one worker."""
    return outcome.job_id, outcome.token


def _once_each(owed: list[Finished]) -> list[Finished]:
    """The first of what is owed, up to where a job comes for the second time."""
    if len({each.outcome.job_id.int for each in owed}) == len(owed):
        return owed
    seen = set[UUID]()
    for place, each in enumerate(owed):
        if each.outcome.job_id in seen:
            return owed[:place]
        seen.add(each.outcome.job_id)
    return owed
