"""What a worker owes PostgreSQL and what it holds there: settles, claims, and what is in doubt.

A lost connection leaves two questions: was the settle committed, was the claim? Both are asked again by token on
the next connection. A statement may even be committed *after* that question (its backend lives on for a
while), so a refused settle that had been in doubt is asked for once more, and a claim in doubt several times.
"""

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final
from uuid import UUID, uuid4

from pmqd import metrics
from pmqd.desk import Desk, Finished
from pmqd.errors import StoreUnavailable
from pmqd.job import Action, Claimed, Outcome, Status
from pmqd.retry import harmless
from pmqd.slot import Slot
from pmqd.store import StatementError, Store
from pmqd.store_rows import Order

log = logging.getLogger(__name__)

_ASK_EVERY_SECONDS: Final = 1.0
_ASK_FOR_SECONDS: Final = 15.0  # longer than a lost statement may run: statement_timeout is 5 s
_STATUS_OF: Final = {
    Action.COMPLETE: Status.COMPLETED,
    Action.FAIL: Status.FAILED,
    Action.CANCEL: Status.CANCELLED,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What one exchange with PostgreSQL brought.

    Attributes:
        settled: outcomes that count, with the status that each row has now.
        claimed: jobs won.
    """

    settled: list[tuple[Outcome, str]] = field(default_factory=list)
    claimed: list[Claimed] = field(default_factory=list)


@dataclass(slots=True)
class _ClaimInDoubt:
    """A claim whose commit was not heard of; asked for by its token until `until` (monotonic seconds)."""

    token: UUID
    until: float
    ask_at: float = 0.0


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
    ) -> None:
        """Takes the store, the desk and the arena's record (both learn what is owed), who claims, and the crash points."""
        self._store = store
        self._desk = desk
        self._slot = slot
        self._worker_id = worker_id
        self._instance_id = instance_id
        self._checkpoint = checkpoint
        self._owed: list[Finished] = []
        self._doubtful: list[Finished] = []
        self._asked: set[UUID] = set()  # jobs owed whose settle was in doubt before
        self._held: dict[UUID, int] = {}
        self._closed: list[UUID] = []
        self._claims_in_doubt: list[_ClaimInDoubt] = []

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
        return bool(self._closed)

    def oldest(self) -> float | None:
        """When the first job ended whose settle is owed (monotonic seconds)."""
        return self._owed[0].ended if self._owed else None

    def owe(self, finished: Sequence[Finished]) -> list[tuple[Outcome, str]]:
        """Takes what has ended; gives back what is settled already, by the handler itself."""
        done = []
        for each in finished:
            if each.acknowledged:
                done.append((each.outcome, _status(each.outcome)))
                self._let_go(each.outcome.token)
            elif each.doubt is not None:
                self._doubtful.append(each)
            else:
                self._owed.append(each)
        if done:
            metrics.count_outcomes([outcome for outcome, _ in done])
            self._tell_desk()
        return done

    def saved(self) -> tuple[list[Outcome], list[UUID]]:
        """All settles that PostgreSQL has not acknowledged, and the claims that are over with them.

        They count as in doubt from now on: somebody else may apply what is written down.
        """
        self._doubtful, self._owed = [*self._doubtful, *self._owed], []
        outcomes = [each.outcome for each in self._doubtful]
        return outcomes, self._over_with(outcomes)

    def settle(self) -> Answer:
        """Settles what is owed."""
        return self._exchange([])

    def claim(self, ids: Sequence[UUID]) -> Answer:
        """Claims jobs, and settles what is owed with the same commit."""
        return self._exchange(list(dict.fromkeys(ids)))

    def steal(self, queues: Sequence[str], limit: int, order: Order) -> list[Claimed]:
        """Claims up to `limit` of the best jobs of these queues without any hint."""
        token = self._new_token()
        try:
            claimed = self._store.steal(
                queues,
                limit,
                order=order,
                token=token,
                worker_id=self._worker_id,
                instance_id=self._instance_id(),
            )
        except StoreUnavailable:
            self._doubt_claim(token)
            raise
        return self._won(token, claimed)

    def read_back(self, now: float) -> Answer:
        """Asks for what is in doubt: settles now, claims as often as they may still appear."""
        answer = Answer()
        if self._doubtful:
            answer.settled.extend(self._read_settles())
        for claim in [each for each in self._claims_in_doubt if each.ask_at <= now]:
            try:
                claimed = self._store.claimed(claim.token)
            except StoreUnavailable:
                if not answer.claimed:
                    raise
                break  # what has been found is this worker's, and nobody would ask for it again
            claim.ask_at = now + _ASK_EVERY_SECONDS
            if claimed or now >= claim.until:
                self._claims_in_doubt.remove(claim)
                answer.claimed.extend(self._won(claim.token, claimed))
        return answer

    def _read_settles(self) -> list[tuple[Outcome, str]]:
        asked = [each.doubt or each.outcome for each in self._doubtful]
        found = self._store.settled_ids(asked)
        again = [replace(each, doubt=None) for each in self._doubtful if each.outcome.job_id not in found]
        self._owed = again + self._owed
        self._asked |= {each.outcome.job_id for each in again}
        self._doubtful = []
        return self._acknowledge([outcome for outcome in asked if outcome.job_id in found])

    def _exchange(self, ids: list[UUID]) -> Answer:
        try:
            return self._send_or_singly(ids)
        except StoreUnavailable:
            self._doubtful, self._owed = [*self._doubtful, *self._owed], []
            raise

    def _send_or_singly(self, ids: list[UUID]) -> Answer:
        try:
            return self._send(self._owed, ids)
        except StatementError as error:
            if not self._owed:
                raise
            log.warning("a settle of %d jobs was refused, settling one by one: %s", len(self._owed), error)
            return self._settle_singly()

    def _settle_singly(self) -> Answer:
        """One outcome that PostgreSQL refuses must not keep all others from being settled."""
        answer = Answer()
        while self._owed:
            each = self._owed[0]
            try:
                found = self._send([each], [])
            except StatementError as error:
                text = harmless(f"the job's end could not be written: {type(error).__name__}: {error}", 2048)
                failed = replace(each.outcome, action=Action.FAIL, result=None, error=text)
                found = self._send([replace(each, outcome=failed)], [])
            answer.settled.extend(found.settled)
        return answer

    def _send(self, owed: list[Finished], ids: list[UUID]) -> Answer:
        """One statement, or two in one transaction: what is owed, and the claim."""
        outcomes = [each.outcome for each in owed]
        closed = self._over_with(outcomes)
        if not ids:
            self._checkpoint("worker.settling")
            statuses = self._store.settle(outcomes, closed)
            claimed: list[Claimed] = []
        else:
            statuses, claimed = self._claim(outcomes, closed, ids)
        self._checkpoint("worker.settled")
        del self._owed[: len(owed)]
        self._closed = []
        return Answer(self._answered(outcomes, closed, statuses), claimed)

    def _claim(
        self, outcomes: list[Outcome], closed: list[UUID], ids: list[UUID]
    ) -> tuple[dict[UUID, str], list[Claimed]]:
        token, statuses = self._new_token(), dict[UUID, str]()
        instance_id = self._instance_id()
        self._checkpoint("worker.claiming")
        try:
            if outcomes or closed:
                statuses, claimed = self._store.settle_and_claim(
                    outcomes, closed, ids, token=token, worker_id=self._worker_id, instance_id=instance_id
                )
            else:
                claimed = self._store.claim(
                    ids, token=token, worker_id=self._worker_id, instance_id=instance_id
                )
        except StoreUnavailable:
            self._doubt_claim(token)
            raise
        except StatementError:
            self._slot.drop_token(token)
            raise
        self._checkpoint("worker.claimed")
        return statuses, self._won(token, claimed)

    def _answered(
        self, outcomes: list[Outcome], closed: list[UUID], statuses: dict[UUID, str]
    ) -> list[tuple[Outcome, str]]:
        refused = [outcome for outcome in outcomes if outcome.job_id not in statuses]
        metrics.count_outcomes(outcomes, statuses)
        settled = [(each, statuses[each.job_id]) for each in outcomes if each.job_id in statuses]
        for outcome in outcomes:
            self._let_go(outcome.token, told=closed)
        settled += self._refused(refused)
        self._asked.difference_update(outcome.job_id for outcome in outcomes)
        self._tell_desk()
        return settled

    def _refused(self, refused: list[Outcome]) -> list[tuple[Outcome, str]]:
        """Settles that met no row: taken from us, unless an earlier sending of them came through after all."""
        asked = [outcome for outcome in refused if outcome.job_id in self._asked]
        found = set[UUID]()
        if asked:
            with contextlib.suppress(
                StoreUnavailable
            ):  # then it counts as taken from us; nothing is lost by that
                found = self._store.settled_ids(asked)
        stale = [outcome for outcome in refused if outcome.job_id not in found]
        metrics.count_stale(len(stale))
        for outcome in stale:
            log.warning(
                "job %s was taken from this worker before it settled; its result is dropped", outcome.job_id
            )
        settled = [outcome for outcome in asked if outcome.job_id in found]
        metrics.count_outcomes(settled)
        return [(outcome, _status(outcome)) for outcome in settled]

    def _acknowledge(self, outcomes: list[Outcome]) -> list[tuple[Outcome, str]]:
        """Counts settles that were found committed."""
        metrics.count_outcomes(outcomes)
        for outcome in outcomes:
            self._let_go(outcome.token)
        self._tell_desk()
        return [(outcome, _status(outcome)) for outcome in outcomes]

    def _tell_desk(self) -> None:
        owed = (each.outcome for each in (*self._doubtful, *self._owed))
        # What is given back unstarted is not among those that a crash interrupts.
        self._desk.settled([each.job_id for each in owed if each.action is not Action.RELEASE])

    # claims

    def _new_token(self) -> UUID:
        token = uuid4()
        self._slot.add_token(token)
        return token

    def _won(self, token: UUID, claimed: list[Claimed]) -> list[Claimed]:
        if claimed:
            self._held[token] = len(claimed)
        else:
            self._slot.drop_token(token)
        return claimed

    def _doubt_claim(self, token: UUID) -> None:
        self._claims_in_doubt.append(_ClaimInDoubt(token, time.monotonic() + _ASK_FOR_SECONDS))

    def _over_with(self, outcomes: Sequence[Outcome]) -> list[UUID]:
        """Claims of which nothing is left once these outcomes are settled."""
        counts = Counter(outcome.token for outcome in outcomes)
        return [*self._closed, *(token for token, n in counts.items() if self._held.get(token, 0) <= n)]

    def _let_go(self, token: UUID, told: Sequence[UUID] = ()) -> None:
        """One job less under a token; with the last one the claim is over, which PostgreSQL is told unless it was."""
        left = self._held.get(token, 0) - 1
        if left > 0:
            self._held[token] = left
            return
        if self._held.pop(token, None) is not None:
            self._slot.drop_token(token)
            if token not in told:
                self._closed.append(token)


def _status(outcome: Outcome) -> str:
    """What a settle makes of its row, as far as its sender can know."""
    return str(_STATUS_OF.get(outcome.action, Status.QUEUED))
