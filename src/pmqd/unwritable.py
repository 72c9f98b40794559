"""Jobs whose rows PostgreSQL refuses to have written (a customer's trigger or constraint): said once, left alone for a while."""

import logging
from typing import Final
from uuid import UUID

log = logging.getLogger(__name__)

ALONE_SECONDS: Final = 30.0
_MOST: Final = 10_000


class Unwritable:
    """What one process has met of them. Nothing of it is a truth: the next try decides."""

    def __init__(self, seconds: float = ALONE_SECONDS) -> None:
        """Takes how long such a job is left alone."""
        self._seconds = seconds
        self._until: dict[UUID, float] = {}

    def add(self, job_id: UUID, what: str, error: Exception, now: float) -> None:
        """Leaves a job alone for a while; says so the first time.

        Args:
            job_id: the job.
            what: what could not be done with it.
            error: why.
            now: monotonic seconds.
        """
        if job_id not in self._until:
            log.error("%s, tried again now and then: %s", what, error, extra={"job_id": str(job_id)})
        if len(self._until) >= _MOST:
            del self._until[next(iter(self._until))]
        self._until[job_id] = now + self._seconds

    def forget(self, job_id: UUID) -> None:
        """Its row could be written after all."""
        self._until.pop(job_id, None)

    def current(self, now: float) -> list[UUID]:
        """The jobs to be left alone at this moment."""
        return [job_id for job_id, until in self._until.items() if now < until] if self._until else []
