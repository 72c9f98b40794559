"""Functions that mutants put in the place of the product's: the same story with one sentence missing."""
# ruff: noqa: ARG001 - they are called as the product's own are, whatever they make of it

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final
from uuid import UUID

from pmqd import metrics, store_session
from pmqd.config import PostgresSettings
from pmqd.job import BAND_RANGES, Outcome
from pmqd.ledger import Ledger
from pmqd.recovery import Death, Verdict, cause
from pmqd.store import Fate, Room

OLD_CLAIM_SECONDS: Final = 0.2


_EXCHANGE: Final = Ledger._exchange  # noqa: SLF001 - what a mutant changes is what nobody else may touch


def exchange_and_forget(self: Any, wanted: Any) -> Any:
    """Ledger._exchange: what could not be settled counts as settled."""
    try:
        return _EXCHANGE(self, wanted)
    finally:
        self._doubtful = []


def doubt_nothing(self: Any, now: float) -> list[Any]:
    """Claims.read_back: a claim whose answer was lost is not asked for."""
    self._in_doubt.clear()
    return []


def resend_all(self: Any) -> list[tuple[Outcome, str]]:
    """Ledger._read_settles: what is in doubt is settled again, whatever became of it."""
    again = [replace(each, doubt=None) for each in self._doubtful]
    self._owed, self._doubtful = again + self._owed, []
    return []


def close_early(self: Any, outcomes: Sequence[Outcome]) -> list[UUID]:
    """Claims.over_with: a claim is closed with the first of its jobs."""
    return [*self._closed, *{outcome.token for outcome in outcomes}]


def never_steal(self: Any, now: float) -> bool:
    """Clerk._may_steal: no hint, no job, however many wait."""
    self._may_dive = self._deep = False
    return False


def never_repair(self: Any, now: float) -> None:
    """Lead._repair: what is marked has its hint, surely."""
    self._owed.clear()


def push_then_mark(self: Any, wanted: Any, most: int) -> list[int]:
    """Lead._move: first the hint, then the mark."""
    rooms = [Room(each.queue_name, *BAND_RANGES[each.band], each.count) for each in wanted]
    with self._store.connection.transaction(force_rollback=True):
        seen = self._store.mark_ids(self._term, rooms, most=most)
    if seen:
        self._push({(wanted[place].queue_name, wanted[place].band): each for place, each in seen.items()})
    self._store.mark_ids(self._term, rooms, most=most)
    return [seen[place].count if place in seen else 0 for place in range(len(wanted))]


def rescue_nothing(*_: Any, **__: Any) -> list[Any]:
    """Store._rescue: the dead keep what they held."""
    return []


def rescue_by_age(self: Any, beat: Any) -> None:
    """Rescuer.strays: whoever runs a job for long is taken for dead."""
    rows = self._store.attempt(
        lambda connection: connection.execute(
            f"select distinct worker_id from {self._store._postgres.schema_name}.claims"  # noqa: S608, SLF001
            " where claimed_at < now() - %s * interval '1 s'",
            [OLD_CLAIM_SECONDS],
        ).fetchall()
    )
    for (worker_id,) in rows:
        self._store.rescue(worker_id, fates={}, default=Fate.INTERRUPTED, cause="it takes long", alone=False)


_POST: Final = metrics.post


def post_for_the_living(
    count: metrics.Count, receipt: Any | None = None, identifier: str | None = None
) -> None:
    """metrics.post: what the dead had settled without hearing of it is nobody's."""
    if identifier is None:
        _POST(count, receipt)


def judge_all_unstarted(death: Death) -> Verdict:
    """judge: no job had begun, so no attempt is charged."""
    return Verdict({}, Fate.UNSTARTED, cause(death), alone=False)


_GUARDS = store_session._guards  # noqa: SLF001 - what a mutant changes is what nobody else may touch


def lazy_guards(postgres: PostgresSettings, lock_timeout_ms: int) -> dict[str, str]:
    """store_session._guards: no commit waits for the disk."""
    return {**_GUARDS(postgres, lock_timeout_ms), "synchronous_commit": "off"}
