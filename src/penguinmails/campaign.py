"""A campaign: its list from a CSV file, and deliveries and jobs made of it, all or none, in one transaction.

The list is written first, with one job `campaign.process` that makes the rest of it. That job has a queue of its own,
`campaign:process`: it works for seconds where a mail takes milliseconds, so it needs its own timeout, must not stand before
the mails of other campaigns, and must not be killed by the `isolation` that those need, as it does nothing outside PostgreSQL.
"""

import csv
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4, uuid5

import orjson
from psycopg import Connection

from penguinmails.deliveries import State
from penguinmails.message import (
    MailTemplate,
    MessageError,
    checked_address,
    clean_name,
    delivery_id,
    load_template,
)
from penguinmails.queues import CAMPAIGN, app
from penguinmails.schema import query
from penguinmails.sending import send_campaign_mail
from penguinmails.templating import missing_variables, shown
from pmqd import Discard, EnqueueError, Job

BATCH = 1000
SUPPRESSED = 4  # where new_recipients has it
SHOWN_FAULTS = 10
OWN_COLUMNS = ("email", "name")

Progress = Callable[[int], None]
"""Told how many jobs have been written so far."""


class CampaignError(ValueError):
    """The file or the template does not fit; nothing was enqueued. One line per fault."""


@dataclass(frozen=True, slots=True)
class Recipient:
    """One line of the file."""

    email: str
    name: str
    variables: dict[str, str]


@dataclass(frozen=True, slots=True)
class Expansion:
    """What was made of a list: mails that will be sent, and recipients who are suppressed."""

    queued: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Recipients:
    """The whole file: whom it names, and how many of its lines named somebody again."""

    people: Sequence[Recipient]
    repeated: int


def read_recipients(file: Path) -> Recipients:
    """The recipients of a CSV file (UTF-8, a header with `email` and perhaps `name`; other columns are variables).

    An address that comes again, in whatever case, is counted and left out: nobody gets a campaign twice.

    Raises:
        CampaignError: the file cannot be read, has no column `email`, or has lines that do not fit; names them.
    """
    people: dict[str, Recipient] = {}
    faults: list[str] = []
    repeated = 0
    for line, row in _rows(file):
        try:
            recipient = _recipient(row)
        except MessageError as error:
            faults.append(f"{file}, line {line}: {error}")
            continue
        repeated += recipient.email.casefold() in people
        people.setdefault(recipient.email.casefold(), recipient)
    if faults:
        more = len(faults) - SHOWN_FAULTS
        raise CampaignError("\n".join(faults[:SHOWN_FAULTS] + ([f"and {more} more"] if more > 0 else [])))
    if not people:
        raise CampaignError(f"{file}: there is no recipient in it")
    return Recipients(list(people.values()), repeated)


def check_template(
    folder: Path, name: str, recipients: Recipients, *, given: Collection[str] = ()
) -> MailTemplate:
    """The template, if every recipient has all that it uses: found out before the first mail, not by each job.

    Args:
        folder: where the templates are.
        name: the template's name.
        recipients: from `read_recipients`.
        given: variables that every mail has beside the file's columns, see `penguinmails.settings.given_variables`.

    Raises:
        CampaignError: there is no such template, or it uses a column that the file does not have.
    """
    try:
        template = load_template(folder, name)
    except MessageError as error:
        raise CampaignError(str(error)) from error
    columns = {*OWN_COLUMNS, *recipients.people[0].variables}
    missing = missing_variables(template, columns.union(given))
    if missing:
        raise CampaignError(
            f"template {name!r} uses {shown(missing)}; the file has the columns {', '.join(sorted(columns))}"
        )
    return template


def create_campaign(
    conn: Connection[Any],
    recipients: Recipients,
    *,
    template: str,
    campaign_id: UUID | None = None,
    name: str = "",
    priority: int | None = None,
    account: str | None = None,
    progress: Progress | None = None,
) -> UUID:
    """Write a campaign and its list; nothing is sent before `process_campaign` or `expand_campaign` made deliveries of it.

    Args:
        conn: a connection in a transaction.
        recipients: from `read_recipients`.
        template: the template's name, see `check_template`.
        campaign_id: None makes a new one. One that exists is given the recipients that it does not have yet.
        name: for people.
        priority: of its mails, 1 to 32767, lower runs first; None is the queue's own.
        account: over which they are sent, see `penguinmails.smtp.account_named`; None: the default one.
        progress: is told how many recipients have been written so far.

    Returns:
        The campaign's id.
    """
    campaign_id = campaign_id or uuid4()
    facts = {"id": campaign_id, "name": name, "template": template, "priority": priority, "account": account}
    is_new = conn.execute(query("add_campaign"), facts).fetchone() is not None
    known = (
        set() if is_new else {row[0] for row in conn.execute(query("known_recipients"), {"id": campaign_id})}
    )
    with conn.cursor() as cursor, cursor.copy(query("copy_recipients")) as copy:
        for number, person in enumerate(recipients.people, start=1):
            recipient_id = uuid5(campaign_id, person.email)
            if recipient_id not in known:
                variables = orjson.dumps(person.variables).decode()
                copy.write_row((campaign_id, recipient_id, person.email, person.name, variables))
            if progress is not None and (number % BATCH == 0 or number == len(recipients.people)):
                progress(number)
    return campaign_id


def expand_campaign(
    conn: Connection[Any], campaign_id: UUID, *, progress: Callable[[int, int], None] | None = None
) -> Expansion:
    """Make a delivery and a job for every recipient who has none yet; for a suppressed one a delivery that is skipped.

    All of it is in the caller's transaction, and the campaign's row is locked: two that do it at once do it one after the
    other, and the second finds nothing to do.

    Args:
        conn: a connection in a transaction.
        campaign_id: from `create_campaign`.
        progress: is told how many recipients of how many are done.

    Raises:
        CampaignError: there is no such campaign, or a recipient whose variables are no texts.
    """
    row = conn.execute(query("lock_campaign"), {"id": campaign_id}).fetchone()
    if row is None:
        raise CampaignError(f"there is no campaign {campaign_id}")
    template, priority, account, total = row
    options = {"tags": [f"campaign:{campaign_id}"], **({} if priority is None else {"priority": priority})}
    queued = skipped = 0
    with conn.cursor(name="recipients") as cursor:
        cursor.execute(query("new_recipients"), {"id": campaign_id})
        while batch := cursor.fetchmany(BATCH):
            wanted = [each for each in batch if each[SUPPRESSED] is None]
            jobs = _enqueue(conn, campaign_id, (template, account), wanted, options)
            _copy_deliveries(conn, campaign_id, batch, iter(jobs), account)
            queued += len(wanted)
            skipped += len(batch) - len(wanted)
            if progress is not None:
                progress(queued + skipped, total)
    conn.execute(query("campaign_started"), {"id": campaign_id})
    return Expansion(queued, skipped)


def start_campaign(
    conn: Connection[Any],
    recipients: Recipients,
    *,
    template: str,
    campaign_id: UUID | None = None,
    priority: int | None = None,
    account: str | None = None,
    progress: Progress | None = None,
) -> UUID:
    """Write a campaign, its deliveries and their jobs at once; they exist once the caller's transaction commits.

    Args:
        conn: a connection in a transaction.
        recipients: from `read_recipients`.
        template: the template's name, see `check_template`.
        campaign_id: None makes a new one. The same id and the same address are the same delivery.
        priority: 1 to 32767, lower runs first; None is the queue's own.
        account: over which the mails are sent; None: the default one.
        progress: is told how many jobs have been written so far.

    Returns:
        The campaign's id.
    """
    made = create_campaign(
        conn, recipients, template=template, campaign_id=campaign_id, priority=priority, account=account
    )
    expand_campaign(conn, made, progress=None if progress is None else lambda done, _total: progress(done))
    return made


@app.task(queue=CAMPAIGN, name="campaign.process", timeout=600)
def process_campaign(job: Job, *, campaign_id: UUID) -> None:
    """Make deliveries and jobs of a campaign's list, in the transaction that completes this job: all of them, or none.

    A worker that dies in the middle has written nothing; one that dies after the commit has completed its job.

    Args:
        job: the job itself.
        campaign_id: the campaign.

    Raises:
        Discard: there is no such campaign, or its list does not fit.
    """
    try:
        with job.settling() as conn:
            expand_campaign(
                conn,
                campaign_id,
                progress=lambda done, total: job.progress(done / max(total, 1), f"{done:,} of {total:,}"),
            )
    except (CampaignError, EnqueueError) as error:
        raise Discard(str(error)) from error


def request_campaign(conn: Connection[Any], campaign_id: UUID) -> UUID:
    """Enqueue the one job that makes deliveries of a campaign's list; asked for again it is the same job.

    Returns:
        The job's id.
    """
    job_id, tags = uuid5(campaign_id, "campaign.process"), [f"campaign:{campaign_id}"]
    return process_campaign.enqueue(campaign_id=campaign_id, conn=conn, id=job_id, tags=tags)


def _enqueue(
    conn: Connection[Any],
    campaign_id: UUID,
    how: tuple[str, str | None],
    people: Sequence[Any],
    options: dict[str, Any],
) -> list[UUID]:
    template, account = how
    by_account = {} if account is None else {"account": account}
    rows = [
        {
            "campaign_id": campaign_id,
            "recipient_id": recipient_id,
            "email": email,
            "name": name,
            "template": template,
            "variables": variables,
            **by_account,
            "_options": options,
        }
        for recipient_id, email, name, variables, _ in people
    ]
    return send_campaign_mail.enqueue_many(rows, conn=conn)


def _copy_deliveries(
    conn: Connection[Any],
    campaign_id: UUID,
    people: Sequence[Any],
    jobs: Iterator[UUID],
    account: str | None,
) -> None:
    now = datetime.now(UTC)
    with conn.cursor() as cursor, cursor.copy(query("copy_deliveries")) as copy:
        for recipient_id, email, _name, _variables, suppressed in people:
            ids = (delivery_id(campaign_id, recipient_id), campaign_id, recipient_id)
            if suppressed is None:
                copy.write_row((*ids, email, next(jobs), State.QUEUED.value, None, None, account))
            else:
                reason = f"suppressed: {suppressed}"
                copy.write_row((*ids, email, None, State.SKIPPED.value, reason, now, account))


def _rows(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The lines as dictionaries, with their numbers."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, strict=True)
            columns = reader.fieldnames or ()
            if "email" not in columns:
                raise CampaignError(
                    f"{file}: no column `email` in its first line ({', '.join(columns) or 'empty'})"
                )
            for row in reader:
                if None in row or None in row.values():
                    raise CampaignError(
                        f"{file}, line {reader.line_num}: not {len(columns)} columns as in the first line"
                    )
                yield reader.line_num, row
    except OSError as error:
        raise CampaignError(f"{file}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise CampaignError(f"{file}: not a CSV file in UTF-8: {error}") from error


def _recipient(row: dict[str, str]) -> Recipient:
    variables = {key: value for key, value in row.items() if key not in OWN_COLUMNS}
    return Recipient(checked_address(row["email"]), clean_name(row.get("name", "")), variables)
