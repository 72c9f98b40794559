"""Jobs of penguinmails for tests without a worker: their transactions are real, their ends are written down."""

import contextlib
from collections.abc import Iterator
from typing import Any
from uuid import UUID, uuid4

import psycopg

from penguinmails.queues import SENDING
from pmqd import Discard, Job, SettleRefused
from tests.jobs import a_claim

CAMPAIGN = UUID("018f4d3a-0000-7000-8000-000000000001")
RECIPIENT = UUID("018f4d3a-0000-7000-8000-000000000002")
ARGUMENTS: dict[str, Any] = {
    "campaign_id": CAMPAIGN,
    "recipient_id": RECIPIENT,
    "email": "zoe@example.com",
    "name": "Zoë",
    "template": "welcome",
}


class Port:
    """What a worker gives a job: here transactions whose outcomes are written down instead of settled.

    Attributes:
        owned: False: the job was taken from this worker meanwhile.
        ends: what the job settled itself with: an error's text, or the result.
    """

    def __init__(self, dsn: str, *, owned: bool = True) -> None:
        self.dsn, self.owned = dsn, owned
        self.ends: list[Any] = []

    def progress(self, job: Job, fraction: float, note: str) -> None:
        """Nobody looks."""

    @contextlib.contextmanager
    def settling(self, job: Job, outcome: Discard | None, result: Any) -> Iterator[psycopg.Connection[Any]]:
        """The transaction that ends the job."""
        with psycopg.connect(self.dsn) as conn:
            yield conn
            if not self.owned:
                raise SettleRefused(f"job {job.id} was taken from this worker")
        self.ends.append(result if outcome is None else str(outcome))

    @contextlib.contextmanager
    def transaction(self, job: Job) -> Iterator[psycopg.Connection[Any]]:
        """The transaction that does not."""
        with psycopg.connect(self.dsn) as conn:
            yield conn


def a_job(port: Port, **changes: Any) -> Job:
    """A running job of the queue, under a claim of its own; `changes` are fields of its row."""
    fields = {"id": uuid4(), "queue_name": SENDING, "kind": "send_campaign_mail", "token": uuid4(), **changes}
    return Job(a_claim(**fields), {}, "host:i:w1.1", port)


def handed(port: Port, payload: Any) -> Job:
    """A running job without a kind, for the handler of a queue."""
    return Job(a_claim(id=uuid4(), kind=None, token=uuid4()), payload, "host:i:w1.1", port)


def counted(conn: psycopg.Connection[Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Deliveries by state, as the sums say it and as the table does; states without any are left out."""
    sums = "select state, sum(deliveries)::int from penguinmails.campaign_totals group by state having sum(deliveries) <> 0"
    rows = "select state, count(*)::int from penguinmails.deliveries group by state"
    return dict(conn.execute(sums).fetchall()), dict(conn.execute(rows).fetchall())
