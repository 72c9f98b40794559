"""What the store gives back: what the dead held, claim by claim, so that each is counted once; and what a failover forgot."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from uuid import UUID

from pmqd.store_arrays import array
from pmqd.store_reads import StoreReads
from pmqd.store_rows import claim_parameters, rescue_parameters, rescued_rows
from pmqd.store_session import StatementError
from pmqd.store_types import Fate, Held, Rescued

log = logging.getLogger(__name__)

Account = Callable[[Held, Sequence[UUID], Sequence[Rescued]], AbstractContextManager[None]]
"""Counts a claim's jobs that were given back (the third); inside it the claim is closed, but for jobs that are left (the second)."""


class StoreRescue(StoreReads):
    """Rescue: guarded by the claim's token, job by job, and so often repeated as it takes."""

    _stuck: frozenset[UUID] = frozenset()  # jobs whose rows cannot be written, which was said

    def rescue(
        self,
        worker_id: str,
        *,
        fates: Mapping[UUID, Fate],
        default: Fate,
        cause: str,
        alone: bool = True,
        only: Collection[UUID] | None = None,
        without: Collection[UUID] = (),
        account: Account | None = None,
    ) -> list[Rescued]:
        """Gives back every job that still runs under a claim of a dead worker.

        Args:
            worker_id: Known to be dead.
            fates: Of jobs that have their own.
            default: Of all others.
            cause: What happened, for the log and, where the attempt was cut, the row.
            alone: Whether jobs that were cut run alone the next time: any of them may have done it, and may do it again.
            only: Of these claims alone.
            without: Jobs that stay claimed.
            account: Counts each claim before it is closed; is told again of what an earlier call gave back, when that died
                before the claim was closed.

        Returns:
            What was given back; empty when it has been done before. A row that cannot be written is left out, and found
            again by the next call.
        """
        held = self._held_by("worker", worker_id=worker_id)
        wanted = [each for each in held if only is None or each.token in only]
        return self._rescue(wanted, fates, default, cause, alone=alone, account=account, without=without)

    def rescue_instance(self, instance_id: UUID, cause: str, account: Account | None = None) -> list[Rescued]:
        """Gives back all that an instance held of which nothing lives any more, and ends its lease."""
        held = self._held_by("instance", instance_id=instance_id)
        rescued = self._rescue(held, {}, Fate.INTERRUPTED, cause, alone=False, account=account)
        self.unregister(instance_id)
        return rescued

    def rescue_orphans(self, cause: str, account: Account | None = None) -> list[Rescued]:
        """Gives back what instances hold that are gone or whose lease ran out more than a tick ago."""
        held = self._held_by("orphans")
        rescued = self._rescue(held, {}, Fate.INTERRUPTED, cause, alone=False, account=account)
        self.run("forget_expired")
        return rescued

    def close_claim(self, token: UUID, left: Sequence[UUID] = ()) -> None:
        """A claim is over, but for the jobs that are left in it."""
        self.run("close_claim", {"token": token, "left": list(left)})

    def end_frozen(self, seconds: float) -> list[tuple[int, float]]:
        """Ends sessions of workers that stand still in the middle of a transaction, with the locks that they hold.

        Args:
            seconds: For how long PostgreSQL has waited for the rest.

        Returns:
            Their process numbers at the server, and for how long each has stood still.
        """
        return [(pid, waited) for pid, waited, _ in self.run("end_frozen", {"seconds": seconds})]

    def unregister(self, instance_id: UUID) -> None:
        """Ends a lease. Claims that are left are orphans from now on."""
        self.run("unregister", {"instance_id": instance_id})

    def take_again(
        self, token: UUID, attempts: Mapping[UUID, int], *, worker_id: str, instance_id: UUID
    ) -> list[UUID]:
        """After a failover: makes those jobs of a claim this worker's again of which PostgreSQL forgot that they are.

        Args:
            token: The claim's.
            attempts: The jobs that it still holds, with the number of the attempt.
            worker_id: Whose claim it is.
            instance_id: Its instance; without a lease nothing is taken.

        Returns:
            The jobs that had been forgotten, and could be taken.
        """
        ids = sorted(attempts)
        given = claim_parameters(ids, token, worker_id, instance_id)
        rows = self.run("take_again", {**given, "attempts": array(attempts[job_id] for job_id in ids)})
        return [row[0] for row in rows]

    def give_back_forgotten(
        self, worker_id: str, held: Mapping[UUID, Mapping[int, int]], doubtful: Collection[UUID], cause: str
    ) -> list[Rescued]:
        """After a failover: gives back what PostgreSQL says this worker runs, and which it has settled long ago.

        Args:
            worker_id: Who.
            held: What it really holds: claim token -> the numbers of its jobs.
            doubtful: Tokens of claims that it does not know the answer of: these are left alone.
            cause: What happened, for log and row.
        """
        rescued: list[Rescued] = []
        for claim in self._held_by("worker", worker_id=worker_id):
            mine = held.get(claim.token, {})
            forgotten = {job_id: Fate.INTERRUPTED for job_id in claim.ids if job_id.int not in mine}
            if forgotten and claim.token not in doubtful:
                common = {"token": claim.token, "cause": cause, "alone": False, "close": not mine}
                rescued += self._give_back(forgotten, common)
        return rescued

    def _held_by(
        self, scope: str, worker_id: str | None = None, instance_id: UUID | None = None
    ) -> list[Held]:
        rows = self.run("held", {"scope": scope, "worker_id": worker_id, "instance_id": instance_id})
        return [Held(*row) for row in rows]

    def _rescue(
        self,
        held: Sequence[Held],
        fates: Mapping[UUID, Fate],
        default: Fate,
        cause: str,
        *,
        alone: bool,
        account: Account | None,
        without: Collection[UUID] = (),
    ) -> list[Rescued]:
        """Claim by claim: given back, counted, closed. Who dies in between leaves the claim, and what it gave back is found again."""
        rescued: list[Rescued] = []
        for claim in held:
            chosen = {job_id: fates.get(job_id, default) for job_id in claim.ids if job_id not in without}
            common = {"token": claim.token, "cause": cause, "alone": alone, "close": False}
            try:
                given, stuck = self._give_back(chosen, common), list[UUID]()
            except StatementError:
                given, stuck = self._give_back_singly(chosen, common)
            before = self._given_back_before(claim, {job.job_id for job in given}) if account else []
            left = [job_id for job_id in claim.ids if job_id in without or job_id in stuck]
            if len(left) == len(claim.ids):
                continue  # nothing has changed
            with account(claim, left, [*given, *before]) if account else nullcontext():
                self.close_claim(claim.token, left)
            rescued += given
        return rescued

    def _give_back(self, fates: Mapping[UUID, Fate], common: dict[str, Any]) -> list[Rescued]:
        return rescued_rows(self.run("rescue", {**common, **rescue_parameters(fates)}), fates)

    def _give_back_singly(
        self, fates: Mapping[UUID, Fate], common: dict[str, Any]
    ) -> tuple[list[Rescued], list[UUID]]:
        """One by one: a row that cannot be written must not keep the others from being rescued. What is stuck stays claimed."""
        rescued: list[Rescued] = []
        stuck: list[UUID] = []
        for job_id, fate in fates.items():
            try:
                rescued += self._give_back({job_id: fate}, common)
            except StatementError as error:
                stuck.append(job_id)
                if job_id not in self._stuck:  # once, and not each second
                    text = "cannot be given back, tried again each second: %s"
                    log.error(text, error, extra={"job_id": str(job_id)})  # noqa: TRY400 - one line says all
        self._stuck = self._stuck - {job.job_id for job in rescued} | frozenset(stuck)
        return rescued, stuck

    def _given_back_before(self, claim: Held, now: Collection[UUID]) -> list[Rescued]:
        """Of a claim that is open: what somebody gave back who died before it was counted, as the audit trail has it."""
        missing = [job_id for job_id in claim.ids if job_id not in now]
        parameters = {"ids": missing, "worker_id": claim.worker_id, "claimed_at": claim.claimed_at}
        rows = self.run("given_back", parameters) if missing else []
        return rescued_rows(rows, dict.fromkeys(missing, Fate.INTERRUPTED))
