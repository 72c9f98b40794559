"""Mails of which nobody knows whether they were sent: the list for a person, and the two decisions about each."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from psycopg import Connection, sql

from penguinmails.queues import SENDING
from penguinmails.schema import query
from penguinmails.sending import send_campaign_mail

DROPPED: Final = "held, and dropped by a person"


class HeldError(ValueError):
    """A delivery is not held, or can no longer be sent; nothing was changed. One line per delivery."""


@dataclass(frozen=True, slots=True)
class Held:
    """A held mail: when its last attempt began, and why nobody knows what came of it."""

    id: UUID
    campaign_id: UUID
    email: str
    attempted_at: datetime | None
    reason: str | None


def read_held(conn: Connection[Any], campaign_id: UUID | None = None, *, pmqd: str = "pmqd") -> list[Held]:
    """The held mails, oldest first. Intents whose jobs have ended are held first: no run will find them any more.

    Args:
        conn: in a transaction.
        campaign_id: None is all campaigns.
        pmqd: the name of pmqd's schema.
    """
    conn.execute(_with_pmqd("hold_abandoned", pmqd))
    rows = conn.execute(query("held"), {"campaign": campaign_id}).fetchall()
    return [Held(*row) for row in rows]


def release(conn: Connection[Any], ids: Sequence[UUID], *, pmqd: str = "pmqd") -> int:
    """Send held mails again: each is queued, with a job that sends what its first job was to send.

    Args:
        conn: in a transaction.
        ids: deliveries, from `read_held`.
        pmqd: the name of pmqd's schema.

    Returns:
        How many they are.

    Raises:
        HeldError: one of them is not held, or its job is no longer kept; nothing was changed.
    """
    wanted = list(dict.fromkeys(ids))
    rows = conn.execute(_with_pmqd("lock_held", pmqd), {"ids": wanted}).fetchall()
    found = {row[0] for row in rows}
    _refuse(
        [f"delivery {each} is not held" for each in wanted if each not in found]
        + [
            f"delivery {each}: its job in {SENDING} is no longer kept, so nothing says what to send; drop it"
            for each, kind, *_ in rows
            if kind is None
        ]
    )
    jobs = send_campaign_mail.enqueue_many(
        [
            {**payload, "_options": {"priority": priority, "tags": tags}}
            for _, _, payload, priority, tags in rows
        ],
        conn=conn,
    )
    conn.execute(query("release"), {"ids": [row[0] for row in rows], "jobs": jobs})
    return len(rows)


def drop(conn: Connection[Any], ids: Sequence[UUID]) -> int:
    """Leave held mails unsent: each is skipped for good.

    Raises:
        HeldError: one of them is not held; nothing was changed.
    """
    wanted = list(dict.fromkeys(ids))
    rows = conn.execute(query("drop"), {"ids": wanted, "reason": DROPPED}).fetchall()
    dropped = {row[0] for row in rows}
    _refuse([f"delivery {each} is not held" for each in wanted if each not in dropped])
    return len(dropped)


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise HeldError("\n".join(faults))


def _with_pmqd(name: str, schema: str) -> sql.Composed:
    """A statement that reads pmqd's jobs, whose schema may have another name."""
    return sql.SQL(query(name).decode()).format(pmqd=sql.Identifier(schema))
