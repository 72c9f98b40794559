"""Gives back what the dead held, settles what they had done, and counts both once, whoever dies in the middle.

What a dead worker's notes say is settled in its name first: finished work must not run again. Then what is left of its
claims is given back, claim by claim. Every step is guarded by a claim token and may be repeated; every count is in a
journal before it is made (notes.py), so a second maintenance goes on where the first one died:

    notes: settled, counted in the dead one's own book, released
    claim: its jobs given back, counted, that written down for the next family, the claim closed
    file of saved settles: settled, counted, removed

What is settled or given back and not counted is found again: by the note, the claim or the file that still stands. A claim that
stands though it is counted, because PostgreSQL went away, is known by the arena and, after this family's end, by `counted`.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import orjson

from pmqd import metrics
from pmqd.arena import LIVE, Arena, Kind, Reason, Slot, State
from pmqd.crashpoints import checkpoint
from pmqd.job import Action, Outcome
from pmqd.notes import Note, Pending, Sort, Stage, unpacked_places
from pmqd.recovery import (
    KILLED_PAUSE_SECONDS,
    Death,
    Kills,
    SavedSettlesError,
    Verdict,
    counted_claim,
    forget_counted,
    judge,
    keep_counted,
    load_outcomes,
    put_aside,
    save_outcomes,
    saved_by,
    saved_outcomes,
    saved_settles,
    settles_path,
)
from pmqd.slot import Receipt
from pmqd.store import Beat, Fate, Rescued, StatementError, Store
from pmqd.store_rows import rounds
from pmqd.store_types import Held
from pmqd.unwritable import Unwritable

log = logging.getLogger(__name__)

SETTLE_BATCH: Final = 500
STRAY_BEATS: Final = 4
"""After how many beats a claim that its living worker does not know of is given back."""

Settled = list[tuple[Outcome, str]]


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of outcomes that were settled for somebody else.

    Attributes:
        settled: those that PostgreSQL has, now or from before, with the status they made.
        stale: those that somebody else had taken.
        stuck: those that cannot be written in any way.
    """

    settled: Settled
    stale: list[Outcome]
    stuck: list[Outcome]


class Rescuer:
    """One instance's rescue. Every method may raise `StoreUnavailable`, and is then called again."""

    def __init__(self, store: Store, arena: Arena, state_dir: Path) -> None:
        """Takes PostgreSQL, the shared memory, and the folder in which workers leave settles."""
        self._store, self._arena, self._state_dir = store, arena, state_dir
        self._judged: dict[str, Verdict] = {}  # of dead workers, until a beat sees nothing more of them
        self._stuck: dict[str, list[Outcome]] = {}  # what they had done, and cannot be written
        self._strays: dict[UUID, int] = {}
        self._kills = Kills()
        self._unwritable = Unwritable()

    def dead(self) -> None:
        """Gives back what the dead of this family held. Who is dead is looked up first, so that nobody saves settles in between."""
        self._go_on()
        dead = self._dead()
        for slot in dead:
            _count_again(slot)
        self._settle_strangers(dead)
        for slot in dead:
            self._bury(slot)

    def strays(self, beat: Beat) -> None:
        """Gives back claims that nobody will settle: of workers in no slot, and of living ones that do not know of them.

        Both were under way when they were given up, so nothing of them was started. The arena is read after the beat: an
        id that the beat saw and the arena does not know is dead, a token that it does not know is over or was given up. A row that
        could not be written when its worker was rescued comes here too: the verdict stands until it could be.
        """
        known = {slot.worker_id: slot for slot in self._workers() if slot.state in (*LIVE, State.DEAD)}
        for worker_id in beat.claim_workers:
            if worker_id not in known:
                self._stray_worker(worker_id)
        self._judged = {name: found for name, found in self._judged.items() if name in beat.claim_workers}
        self._stuck = {name: left for name, left in self._stuck.items() if name in beat.claim_workers}
        self._stray_claims(beat, known)
        if beat.orphans and beat.ticking:
            cause = "the lease of the instance that ran it ran out"
            tell(self._store.rescue_orphans(cause, self._accounted), cause)

    def previous(self, instance_id: UUID) -> None:
        """What the last family in our state_dir held: we hold its lock, so none of it lives."""
        cause = f"instance {instance_id} ended without giving it back"
        tell(self._store.rescue_instance(instance_id, cause, self._accounted), cause)

    def save_noted(self) -> None:
        """Writes down what the dead had noted and PostgreSQL could not take: the arena ends with this family, files do not."""
        for slot in self._workers():
            if slot.state != State.DEAD:
                continue
            # What it was counting is settled: if it were saved, the next family would count it too.
            _count_again(slot)
            whole = [note.outcome for note in slot.noted() if note.sort == Sort.WHOLE]
            # What it saved itself would be applied once and counted twice.
            known = {_key(each) for each in saved_outcomes(self._state_dir, slot.worker_id)}
            outcomes = [each for each in whole if _key(each) not in known]
            if not outcomes:
                continue
            path = settles_path(self._state_dir, slot.worker_id)
            try:
                save_outcomes(path, outcomes, [])
            except OSError as error:
                log.error("%d settles cannot be written to %s: %s", len(outcomes), path, error)  # noqa: TRY400
            else:
                log.warning("%d settles of worker %s are kept in %s", len(outcomes), slot.worker_id, path)

    def _dead(self) -> list[Slot]:
        now = time.monotonic()
        self._kills.note(self._killed(), now)
        if self._kills.just_now(now):
            time.sleep(KILLED_PAUSE_SECONDS)  # whether others were killed too
            self._kills.note(self._killed(), now)
        return [slot for slot in self._workers() if slot.state == State.DEAD]

    def _killed(self) -> dict[str, float]:
        deaths = ((slot.worker_id, slot.death()) for slot in self._workers() if slot.state == State.DEAD)
        return {
            name: found.at
            for name, found in deaths
            if found is not None and found.exit_code == -signal.SIGKILL and found.reason == Reason.SIGNAL
        }

    def _workers(self) -> list[Slot]:
        return [slot for slot in self._arena.slots if slot.kind == Kind.WORKER]

    # --- one dead worker

    def _bury(self, slot: Slot) -> None:
        found = slot.death()
        if found is None:
            return
        notes = slot.noted()
        done = self._settle_noted(slot, notes)
        done |= self._settle_own_files(slot, notes, done)
        death = Death(
            worker_id=slot.worker_id,
            reason=found.reason,
            exit_code=found.exit_code,
            running=tuple(job.job_id for job in slot.running() if (job.job_id, job.token) not in done),
            settling=tuple(
                note.outcome.job_id for note in notes if (note.outcome.job_id, note.outcome.token) not in done
            ),
            culprit=None if found.culprit in {job_id for job_id, _ in done} else found.culprit,
            felled=self._kills.felled(slot.worker_id),
        )
        verdict = judge(death)
        self._judged[death.worker_id] = verdict
        self._carry_out(death.worker_id, verdict)
        # A commit of the dead one may have come through just before its row was to be given back.
        if death.settling:
            self._settle_noted(slot, [note for note in slot.noted() if note.sort != Sort.WHOLE])
        checkpoint("maintenance.buried")
        slot.rescued()
        if found.reason != Reason.BOOT:
            # Hints that it had popped are nowhere now; their rows are still marked.
            self._arena.request_reoffer()

    def _settle_noted(self, slot: Slot, notes: Sequence[Note]) -> set[tuple[UUID, UUID]]:
        """Settles what the dead one had done; returns the jobs, with their tokens, of which nothing is to be given back.

        What the handler had settled itself counts if PostgreSQL says so; else what came after it, if anything did.
        """
        unsure = [note.outcome for note in notes if note.sort != Sort.WHOLE]
        known = self._store.settled_ids(unsure) if unsure else {}
        settled = [(each, known[_key(each)]) for each in unsure if _key(each) in known]
        whole = [
            note.outcome for note in notes if note.sort == Sort.WHOLE and _key(note.outcome) not in known
        ]
        applied = self._apply(whole)
        checkpoint("maintenance.settled")
        settled += applied.settled
        over = {_key(outcome) for outcome, _ in settled} | {_key(outcome) for outcome in applied.stale}
        stuck = {_key(outcome) for outcome in applied.stuck}
        if stuck:
            self._stuck[slot.worker_id] = applied.stuck
        places = [note.place for note in notes if _key(note.outcome) in over]
        if places:
            receipt = Receipt(slot, places, _counting, _counted)
            count = metrics.Count().settled(settled).stale(len(applied.stale))
            metrics.post(count, receipt, identifier=_book_of(slot))
            log.info("%d jobs that worker %s had finished are settled", len(settled), slot.worker_id)
        return over | stuck

    def _apply(self, outcomes: Sequence[Outcome]) -> Applied:
        """Settles for somebody else; what was settled before, by whomever, counts as settled."""
        applied = Applied([], [], [])
        for at in range(0, len(outcomes), SETTLE_BATCH):
            for batch in rounds(outcomes[at : at + SETTLE_BATCH]):
                self._apply_batch(batch, applied)
        return applied

    def _apply_batch(self, batch: Sequence[Outcome], applied: Applied) -> None:
        try:
            statuses = self._store.settle(batch, ())
        except StatementError as error:
            if (
                len(batch) > 1
            ):  # one outcome that cannot be stored must not keep the others from being settled
                for outcome in batch:
                    self._apply_batch([outcome], applied)
                return
            statuses = self._settle_as_failed(batch[0], error, applied)
        missing = [each for each in batch if each.job_id not in statuses and each not in applied.stuck]
        # The dead one's own sending may have been committed, or that of a maintenance which died then.
        before = self._store.settled_ids(missing) if missing else {}
        applied.settled.extend((each, statuses[each.job_id]) for each in batch if each.job_id in statuses)
        applied.settled.extend((each, before[_key(each)]) for each in missing if _key(each) in before)
        applied.stale.extend(each for each in missing if _key(each) not in before)

    def _settle_as_failed(self, outcome: Outcome, error: StatementError, applied: Applied) -> dict[UUID, str]:
        text = f"the job's end could not be written: {error}"
        try:
            return self._store.settle([replace(outcome, action=Action.FAIL, result=None, error=text)], ())
        except StatementError as refused:
            what = "the job's end cannot be written"
            self._unwritable.add(outcome.job_id, what, refused, time.monotonic())
            applied.stuck.append(outcome)
            return {}

    def _carry_out(self, worker_id: str, verdict: Verdict, only: Iterable[UUID] | None = None) -> None:
        """Gives back what is left of a worker's claims, but for jobs that were finished and cannot be written."""
        stuck = {outcome.job_id for outcome in self._stuck.get(worker_id, ())}
        rescued = self._store.rescue(
            worker_id,
            fates=verdict.fates,
            default=verdict.default,
            cause=verdict.cause,
            alone=verdict.alone,
            only=None if only is None else set(only),
            without=stuck,
            account=self._accounted,
        )
        tell(rescued, verdict.cause)

    # --- claims that nobody knows

    def _stray_worker(self, worker_id: str) -> None:
        stuck = self._stuck.pop(worker_id, [])
        if stuck:
            applied = self._apply(stuck)
            metrics.post(metrics.Count().settled(applied.settled).stale(len(applied.stale)))
            if applied.stuck:
                self._stuck[worker_id] = applied.stuck
        cause = f"worker {worker_id} died before its claim was answered"
        verdict = self._judged.get(worker_id) or Verdict({}, Fate.UNSTARTED, cause)
        self._carry_out(worker_id, verdict)

    def _stray_claims(self, beat: Beat, known: dict[str, Slot]) -> None:
        """A claim whose commit came after its worker had given it up: the worker lives, and nobody there knows of it."""
        tokens = {worker_id: set(slot.tokens()) for worker_id, slot in known.items() if _lists_all(slot)}
        seen = {
            token: worker_id
            for token, worker_id in beat.claims
            if worker_id in tokens and token not in tokens[worker_id]
        }
        self._strays = {token: self._strays.get(token, 0) + 1 for token in seen}
        for token, worker_id in seen.items():
            if self._strays[token] >= STRAY_BEATS:
                cause = f"worker {worker_id} had given the claim up before it was committed"
                self._carry_out(worker_id, Verdict({}, Fate.UNSTARTED, cause), [token])

    # --- settles that outlived their process

    def _settle_strangers(self, dead: Sequence[Slot]) -> None:
        """Applies what workers of families before this one could not settle. A worker that lives still settles by itself."""
        own = [slot.worker_id for slot in self._workers() if slot.live or slot in dead]
        for path in saved_settles(self._state_dir):
            if not any(saved_by(path, worker_id) for worker_id in own):
                self._settle_file(path)

    def _settle_own_files(
        self, slot: Slot, notes: Sequence[Note], done: set[tuple[UUID, UUID]]
    ) -> set[tuple[UUID, UUID]]:
        """What a dead worker of this family could not settle, after its notes: these hold all of it that found a place.

        So a file is only removed when the notes are settled. What it knows of a note that has no result is settled by the file, and
        counted by the note.
        """
        unsure = [note for note in notes if _key(note.outcome) not in done]
        found = [path for path in saved_settles(self._state_dir) if saved_by(path, slot.worker_id)]
        for path in found:
            self._settle_file(path, done, {_key(note.outcome) for note in unsure})
        return (
            self._settle_noted(slot, [note for note in unsure if note.sort != Sort.WHOLE]) if found else set()
        )

    def _settle_file(
        self,
        path: Path,
        done: AbstractSet[tuple[UUID, UUID]] | None = None,
        noted: AbstractSet[tuple[UUID, UUID]] = frozenset(),
    ) -> None:
        """Applies one file, without what is done; counts it, without what is noted."""
        try:
            outcomes, _ = load_outcomes(path)
            if done is not None:
                # What is not noted any more was settled and counted, or had found no place.
                known = self._store.settled_ids(outcomes)
                outcomes = [each for each in outcomes if _key(each) not in known and _key(each) not in done]
            applied = self._apply(outcomes)
            checkpoint("maintenance.settled")
            counted = [(each, status) for each, status in applied.settled if _key(each) not in noted]
            self._count_saved(path, replace(applied, settled=counted))
        except (SavedSettlesError, StatementError, OSError) as error:
            # Whatever is wrong with one file, all others and the rescue must not wait for it.
            put_aside(path, error)

    def _count_saved(self, path: Path, applied: Applied) -> None:
        count = metrics.Count().settled(applied.settled).stale(len(applied.stale))
        metrics.post(count, self._slip({"file": path.name}))
        checkpoint("maintenance.counted")
        if applied.stuck:
            put_aside(path, SavedSettlesError(f"{path}: {len(applied.stuck)} settles cannot be written"))
        path.unlink(missing_ok=True)
        self._arena.journal.end()
        log.info("%d saved settles applied, %d refused", len(applied.settled), len(applied.stale))

    # --- counting once

    @contextlib.contextmanager
    def _accounted(self, claim: Held, left: Sequence[UUID], rescued: Sequence[Rescued]) -> Iterator[None]:
        """Counts what a claim gave back; inside it the claim is closed."""
        checkpoint("maintenance.rescued")
        rest = {"claim": str(claim.token), "left": [str(job_id) for job_id in left]}
        metrics.post(metrics.Count().rescued(rescued), self._slip(rest))
        keep_counted(self._state_dir, claim.token, left)
        checkpoint("maintenance.counted")
        yield
        self._arena.journal.end()
        forget_counted(self._state_dir)

    def _slip(self, rest: dict[str, Any]) -> "_Slip":
        return _Slip(self._arena, orjson.dumps({"book": metrics.identifier(), **rest}))

    def _go_on(self) -> None:
        """Ends a count that was begun and not ended: by a process that died, an answer lost, or a family that ended meanwhile."""
        pending = self._arena.journal.pending()
        if pending is not None:
            self._end_count(pending)
        if (claim := counted_claim(self._state_dir)) is not None:
            self._store.close_claim(*claim)
            forget_counted(self._state_dir)

    def _end_count(self, pending: Pending) -> None:
        rest = orjson.loads(pending.rest)
        if pending.stage == Stage.WRITTEN:
            metrics.post_again(rest["book"], pending.changes)
            self._arena.journal.counted()
        if "claim" in rest:
            token, left = UUID(rest["claim"]), [UUID(job_id) for job_id in rest["left"]]
            keep_counted(self._state_dir, token, left)
            self._store.close_claim(token, left)
            forget_counted(self._state_dir)
        else:
            for path in saved_settles(self._state_dir):
                if path.name == rest["file"]:
                    path.unlink(missing_ok=True)
        self._arena.journal.end()


@dataclass(frozen=True, slots=True)
class _Slip:
    """The receipt for what maintenance counts in its own book; whoever has it ends the journal when what follows is done."""

    arena: Arena
    rest: bytes

    def begin(self, changes: bytes) -> None:
        """What the metric files are about to hold, and what is to be done then."""
        self.arena.journal.begin(changes, self.rest)
        checkpoint("maintenance.counting")

    def end(self) -> None:
        """They hold it."""
        self.arena.journal.counted()


def _count_again(slot: Slot) -> None:
    """A count that was under way when its process died: the figures once more, and its notes are released."""
    pending = slot.journal.pending()
    if pending is None:
        return
    if pending.stage == Stage.WRITTEN:
        metrics.post_again(_book_of(slot), pending.changes)
    slot.notes.release(unpacked_places(pending.rest))
    slot.journal.end()


def _counting() -> None:
    checkpoint("maintenance.counting")


def _counted() -> None:
    checkpoint("maintenance.counted")


def _book_of(slot: Slot) -> str:
    """The metric files of a worker: maintenance counts there for a dead one, so that one journal is enough for both."""
    return f"{slot.kind}-{slot.index}"


def _lists_all(slot: Slot) -> bool:
    """Whether all claims of a worker stand in the arena: a few find no place there."""
    return slot.live and not slot.unlisted


def _key(outcome: Outcome) -> tuple[UUID, UUID]:
    return outcome.job_id, outcome.token


def tell(rescued: Sequence[Rescued], cause: str) -> None:
    """Logs what a rescue gave back.

    Args:
        rescued: the store's answer.
        cause: what happened to the owner.
    """
    for job in rescued:
        if job.status == "failed":
            log.error(
                "job failed, its attempts are used up: %s",
                cause,
                extra={"job_id": str(job.job_id), "queue": job.queue_name},
            )
    if rescued:
        log.warning("%d jobs given back: %s", len(rescued), cause)
