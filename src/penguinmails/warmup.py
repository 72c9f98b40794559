"""The queue `warmup:process`: the letters by which a new sending account becomes known, a plan a day.

| job | does |
|---|---|
| `warmup.plan` | judges the day before, enqueues the day's letters and the plan of the next day, all in the transaction that completes it |
| `warmup.outbound` | sends one letter to a seed mailbox, once, as `email-sending` sends a mail |
| `warmup.inbound` | notes a letter of a seed mailbox; has a new one answered, and counts an answer to a letter of ours |
| `warmup.engagement` | answers a letter, or notes what a seed mailbox did with one of ours |

Nobody else starts a day: each plan enqueues the next one. A plan that runs twice plans nothing twice (the day has its row, the jobs have ids made
of account and day), and one that is killed has planned nothing. A plan that runs late, because no worker was there, plans what is left of today.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Literal
from uuid import UUID, uuid5

from psycopg import Connection

from penguinmails import ramps, schema
from penguinmails.deliveries import State, delivery_of
from penguinmails.message import MESSAGE_ID, clean_name, delivery_id
from penguinmails.queues import LATER, WARMUP, app
from penguinmails.ramp import plan_day, reply_at, seeds_of_day
from penguinmails.ramps import NAMESPACE, Warming, letters_id
from penguinmails.schema import query
from penguinmails.sending import Letter, send_once, skip
from penguinmails.settings import MailSettings, mail_settings
from pmqd import Discard, Job, Snooze

SETTINGS_SECONDS = 300.0  # until a plan is tried again that the worker's settings do not allow
LATE = timedelta(hours=1)
"""A letter that starts later than this after its time is left out: nobody is to get a day's letters in a minute at night."""

REPLY = "reply"
MAX_SUBJECT = 150

Action = Literal["reply", "opened", "replied", "moved", "flagged"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Planned:
    """A letter that is to go out at a time (None: now); its campaign is that of the day."""

    letter: Letter
    run_at: datetime | None


@app.task(queue=WARMUP, name="warmup.plan", max_attempts=50, retry=LATER)
def plan_warmup(job: Job, *, account: str, day: date, generation: UUID) -> None:
    """Plan a day of an account, and ask for the next day's plan; see the module's text.

    Args:
        job: the job itself.
        account: its name.
        day: in the time zone of the ramp; one that is over is today.
        generation: of the ramp; after another start or a stop this plan does nothing.

    Raises:
        Snooze: this worker's settings cannot warm the account up; the log says why. Nothing is charged.
    """
    schema.require(job)
    settings = mail_settings()
    wrong = ramps.fault(settings, account)
    if wrong:
        log.error("no warm-up of account %s is planned: %s", account, wrong)
        raise Snooze(SETTINGS_SECONDS)
    with job.settling() as conn:
        plan_account(conn, settings, account, day, generation)


def plan_account(
    conn: Connection[Any], settings: MailSettings, account: str, day: date, generation: UUID
) -> int:
    """What `plan_warmup` does, in the caller's transaction.

    Returns:
        How many letters were enqueued.
    """
    warming = ramps.lock(conn, account)
    if warming is None or warming.generation != generation:
        return 0
    day = max(day, warming.today)
    volume = ramps.decide(conn, settings, warming, day)
    moments = plan_day(warming.hours, day, volume, seed=f"{account}/{day}", now=warming.now)
    facts = {"account": account, "day": day, "planned": len(moments)}
    is_new = conn.execute(query("add_day"), facts).fetchone() is not None
    if is_new and moments:
        _put_letters(conn, warming, day, settings.warmup_template, _letters(settings, account, day, moments))
    request_plan(conn, warming, day + timedelta(days=1))
    return len(moments) if is_new else 0


def request_plan(conn: Connection[Any], warming: Warming, day: date | None = None) -> tuple[date, datetime]:
    """Enqueue the one job that plans a day, as its working hours begin; asked for again it is the same job.

    Args:
        conn: in a transaction.
        warming: the account's ramp.
        day: None: the first day whose working hours are not over.

    Returns:
        The day, and when it is planned.
    """
    if day is None:
        day, run_at = warming.hours.next_plan(warming.now)
    else:
        run_at, _ = warming.hours.window(day)
    plan_warmup.enqueue(
        account=warming.account,
        day=day,
        generation=warming.generation,
        conn=conn,
        id=uuid5(NAMESPACE, f"plan/{warming.account}/{day}/{warming.generation}"),
        run_at=run_at,
        tags=[f"warmup:{warming.account}"],
    )
    return day, run_at


@app.task(queue=WARMUP, name="warmup.outbound", max_attempts=5, timeout=120, retry=LATER)
def send_warmup_letter(
    job: Job,
    *,
    campaign_id: UUID,
    recipient_id: UUID,
    email: str,
    name: str,
    template: str,
    variables: dict[str, str] | None = None,
    account: str | None = None,
    in_reply_to: str = "",
) -> dict[str, str] | None:
    """Send one letter to a seed mailbox, once; arguments, result and errors are those of `send_campaign_mail`.

    One that was never tried and is more than an hour late is skipped.
    """
    letter = Letter(campaign_id, recipient_id, email, name, template, variables or {}, account, in_reply_to)
    late = datetime.now(UTC) - job.run_at
    if late > LATE and job.attempt_count == 1 and not job.interruptions:
        schema.require(job)
        return skip(job, letter, f"late by {late.total_seconds() / 3600:.1f} hours")
    return send_once(job, letter)


@app.task(queue=WARMUP, name="warmup.inbound", retry=LATER)
def note_letter(
    job: Job,
    *,
    account: str,
    message_id: str,
    sender: str,
    subject: str = "",
    in_reply_to: list[str] | None = None,
) -> None:
    """Note a letter that a seed mailbox wrote to an account, once; a new one, no answer to ours, is answered within the working hours.

    Args:
        job: the job itself.
        account: the account that it came to.
        message_id: the letter's, with its angle brackets.
        sender: its address, one of the seed mailboxes.
        subject: the letter's.
        in_reply_to: the Message-IDs that it answers.

    Raises:
        Discard: the sender is no seed mailbox, the account has no ramp, or the Message-ID is none.
    """
    schema.require(job)
    _check_letter(message_id, sender)
    with job.settling() as conn:
        warming = _warming(conn, account)
        is_new = ramps.note(conn, warming, message_id, "received")
        answered = _own(conn, account, in_reply_to or [])
        for each in answered:
            ramps.note(conn, warming, each, "replied")
        if is_new and not answered and warming.state != ramps.PAUSED:
            engage.enqueue(
                account=account,
                message_id=message_id,
                action=REPLY,
                sender=sender,
                subject=subject[:MAX_SUBJECT],
                conn=conn,
                id=uuid5(NAMESPACE, f"{REPLY}/{account}/{message_id}"),
                run_at=reply_at(warming.hours, warming.now, seed=message_id),
                tags=[f"warmup:{account}"],
            )


@app.task(queue=WARMUP, name="warmup.engagement", retry=LATER)
def engage(
    job: Job, *, account: str, message_id: str, action: Action, sender: str = "", subject: str = ""
) -> None:
    """Answer a letter of a seed mailbox, or note what a seed mailbox did with a letter of the account; each once.

    Args:
        job: the job itself.
        account: the account.
        message_id: the letter's, with its angle brackets.
        action: `reply` has it answered; `opened`, `replied`, `moved` (out of the spam folder) and `flagged` are noted.
        sender: with `reply`, whom to answer: one of the seed mailboxes.
        subject: with `reply`, of the letter.

    Raises:
        Discard: the account has no ramp, or it is no letter of a seed mailbox (`reply`) or of the account (the others).
    """
    schema.require(job)
    _check_letter(message_id, sender if action == REPLY else None)
    with job.settling() as conn:
        warming = _warming(conn, account)
        if action == REPLY:
            _answer(conn, warming, message_id, sender, subject)
        elif not _own(conn, account, [message_id]):
            raise Discard(f"{message_id} is no letter that account {account!r} has sent")
        else:
            ramps.note(conn, warming, message_id, action)


def _answer(conn: Connection[Any], warming: Warming, message_id: str, sender: str, subject: str) -> None:
    if warming.state == ramps.PAUSED or not ramps.note(conn, warming, message_id, "answered"):
        return
    settings, day = mail_settings(), warming.today
    campaign = letters_id(warming.account, day)
    letter = Letter(
        campaign,
        uuid5(campaign, message_id),
        sender,
        "",
        settings.warmup_reply_template,
        {"subject": clean_name(subject.removeprefix("Re: ")[:MAX_SUBJECT]) or "your letter"},
        warming.account,
        message_id,
    )
    _put_letters(conn, warming, day, settings.warmup_template, [Planned(letter, None)])


def _letters(settings: MailSettings, account: str, day: date, moments: Sequence[datetime]) -> list[Planned]:
    campaign = letters_id(account, day)
    seeds = seeds_of_day(settings.warmup_seeds, len(moments), seed=f"{account}/{day}")
    return [
        Planned(
            Letter(
                campaign,
                uuid5(campaign, str(number)),
                seed,
                "",
                settings.warmup_template,
                {"number": str(number), "day": day.isoformat()},
                account,
            ),
            moment,
        )
        for number, (seed, moment) in enumerate(zip(seeds, moments, strict=True), start=1)
    ]


def _put_letters(
    conn: Connection[Any], warming: Warming, day: date, template: str, letters: Sequence[Planned]
) -> None:
    """Deliveries and jobs of letters that nobody has made yet, and the campaign that counts them."""
    account, campaign = warming.account, letters_id(warming.account, day)
    name = f"warm-up of {account}, {day}"
    conn.execute(
        query("add_letters"), {"id": campaign, "name": name, "template": template, "account": account}
    )
    jobs = send_warmup_letter.enqueue_many([_job(each) for each in letters], conn=conn)
    with conn.cursor() as cursor, cursor.copy(query("copy_deliveries")) as copy:
        for each, job in zip((each.letter for each in letters), jobs, strict=True):
            ids = (delivery_id(campaign, each.recipient_id), campaign, each.recipient_id)
            copy.write_row((*ids, each.email, job, State.QUEUED.value, None, None, account))


def _job(planned: Planned) -> dict[str, Any]:
    letter = planned.letter
    options: dict[str, Any] = {
        "id": uuid5(delivery_id(letter.campaign_id, letter.recipient_id), "warmup.outbound"),
        "tags": [f"warmup:{letter.account}", f"campaign:{letter.campaign_id}"],
    }
    if planned.run_at is not None:
        options["run_at"] = planned.run_at
    return {
        "campaign_id": letter.campaign_id,
        "recipient_id": letter.recipient_id,
        "email": letter.email,
        "name": letter.name,
        "template": letter.template,
        "variables": letter.variables,
        "account": letter.account,
        "in_reply_to": letter.in_reply_to,
        "_options": options,
    }


def _check_letter(message_id: str, sender: str | None) -> None:
    if not MESSAGE_ID.fullmatch(message_id):
        raise Discard(f"message_id is {message_id[:80]!r}, allowed: <LEFT@RIGHT>, printable ASCII")
    seeds = {each.casefold() for each in mail_settings().warmup_seeds}
    if sender is not None and sender.casefold() not in seeds:
        raise Discard(f"sender {sender[:80]!r} is none of the {len(seeds)} in PENGUINMAILS_WARMUP_SEEDS")


def _warming(conn: Connection[Any], account: str) -> Warming:
    warming = ramps.lock(conn, account)
    if warming is None:
        raise Discard(f"account {account!r} has no ramp; `penguinmails warmup start` makes one")
    return warming


def _own(conn: Connection[Any], account: str, message_ids: Sequence[str]) -> list[str]:
    """Those of the Message-IDs that are of letters of the account."""
    ids = {each: delivery_of(each) for each in message_ids}
    own = ramps.own_letters(conn, account, [each for each in ids.values() if each is not None])
    return [text for text, each in ids.items() if each in own]
