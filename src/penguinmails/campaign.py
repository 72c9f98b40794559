"""A campaign from a CSV file: all of its jobs, or none, in one transaction."""

import csv
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4, uuid5

from psycopg import Connection

from penguinmails.app import send_campaign_mail
from penguinmails.message import MailTemplate, MessageError, checked_address, clean_name, load_template
from penguinmails.templating import missing_variables, shown

BATCH = 1000
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


def start_campaign(
    conn: Connection[Any],
    recipients: Recipients,
    *,
    template: str,
    campaign_id: UUID | None = None,
    priority: int | None = None,
    progress: Progress | None = None,
) -> UUID:
    """Enqueue one mail for each recipient on the caller's connection; they exist once its transaction commits.

    Args:
        conn: a connection in a transaction.
        recipients: from `read_recipients`.
        template: the template's name, see `check_template`.
        campaign_id: None makes a new one. The same id and the same address are the same delivery.
        priority: 1 to 32767, lower runs first; None is the queue's own.
        progress: is told how many jobs have been written so far.

    Returns:
        The campaign's id.
    """
    campaign_id = campaign_id or uuid4()
    options = {} if priority is None else {"priority": priority}
    tags = [f"campaign:{campaign_id}"]
    written = 0
    for batch in _batches(recipients.people):
        rows = [
            {
                "campaign_id": campaign_id,
                "recipient_id": uuid5(campaign_id, person.email),
                "email": person.email,
                "name": person.name,
                "template": template,
                "variables": person.variables,
                "_options": {**options, "tags": tags},
            }
            for person in batch
        ]
        written += len(send_campaign_mail.enqueue_many(rows, conn=conn))
        if progress is not None:
            progress(written)
    return campaign_id


def _batches(people: Sequence[Recipient]) -> Iterator[Sequence[Recipient]]:
    return (people[start : start + BATCH] for start in range(0, len(people), BATCH))


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
