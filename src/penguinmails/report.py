"""What has become of a campaign, from the sums that the database keeps: one campaign or a million mails cost the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg import Connection

from penguinmails.deliveries import State
from penguinmails.schema import query

UNFINISHED = (State.QUEUED, State.SENDING, State.DEFERRED)
"""States that a job will still change."""


@dataclass(frozen=True, slots=True)
class Report:
    """A campaign and its deliveries by state; the campaign's own facts are None where a producer made none."""

    id: UUID
    name: str | None
    template: str | None
    state: str
    created_at: datetime | None
    started_at: datetime | None
    deliveries: Mapping[State, int]

    @property
    def total(self) -> int:
        """All its deliveries."""
        return sum(self.deliveries.values())


def read_report(conn: Connection[Any], campaign_id: UUID) -> Report | None:
    """The report of a campaign; None if nothing is known of it.

    Its state is `created` (the list waits for campaign.process), `sending`, or `finished` (no job will change a delivery; held
    ones wait for a person).
    """
    row = conn.execute(query("read_campaign"), {"id": campaign_id}).fetchone()
    counts = {
        State(state): int(number) for state, number in conn.execute(query("totals"), {"id": campaign_id})
    }
    if row is None and not counts:
        return None
    deliveries = {state: counts.get(state, 0) for state in State}
    known = row or (campaign_id, None, None, "started", None, None)
    state = known[3] if known[3] == "created" else _progress(deliveries)
    return Report(campaign_id, known[1], known[2], state, known[4], known[5], deliveries)


def _progress(deliveries: Mapping[State, int]) -> str:
    return "sending" if any(deliveries[state] for state in UNFINISHED) else "finished"
