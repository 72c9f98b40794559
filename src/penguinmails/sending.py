"""The queue `email-sending`: one mail to one recipient, at most once unless the setting `ambiguous` says otherwise.

| it ends | the delivery is | the job is |
|---|---|---|
| before the intent is committed | queued or deferred, as before | run again |
| after that, before the outcome is | `sending`; the next run finds it: `held`, or under `resend` sent again | run again, then failed |
| with a yes | sent, in the transaction that completes the job | completed |
| with a no (5xx), or a last "later" | bounced, in the transaction that fails the job and enqueues its bounce | failed |
| with "later", or without having reached the server | deferred, in a transaction of its own | tried again; failed after the last time |
| by its timeout or a cancel, before the end of the mail was sent | deferred, in a transaction of its own | as pmqd says |
| so, once that was sent | `sending`, as if it were killed; `sent` where the yes was heard | as pmqd says |

A deferred delivery and the end of its attempt are two transactions and may come apart: the delivery is deferred and the worker dies before it has asked for the delay.
Then the mail is tried again sooner, and still once. A mail that stays deferred when its job fails never met a verdict about itself
(the server was away, the password wrong): a replay of the job sends it.

Two hosts: while the job was taken from a host that is cut off, that host may be in the middle of a conversation. The new owner finds
its intent and holds the mail. Should the old one hear a yes after all, it writes that down, held or not: it knows.
"""

import random
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import UUID

from penguinmails import deliveries, schema
from penguinmails.accounts import Account, AccountError
from penguinmails.bounce_codes import classify_answer
from penguinmails.deliveries import Attempt, Result, Standing, State
from penguinmails.message import Mail, MessageError, Sender, build_mail, delivery_id, load_template
from penguinmails.queues import BOUNCE, LATER, SENDING, app
from penguinmails.settings import Ambiguous, mail_settings
from penguinmails.smtp import Answer, Connections, Handover, Verdict, account_named
from pmqd import Discard, Job, Retry, SettleRefused

connections = Connections()


@dataclass(frozen=True, slots=True)
class Letter:
    """A mail before it is built; the fields are the arguments of `send_campaign_mail`."""

    campaign_id: UUID
    recipient_id: UUID
    email: str
    name: str
    template: str
    variables: dict[str, str]
    account: str | None = None
    in_reply_to: str = ""


@app.task(queue=SENDING, max_attempts=5, timeout=30, retry=LATER)
def send_campaign_mail(
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
    """Send one campaign's mail to one recipient: once, though the worker be killed at any instant.

    Args:
        job: the job itself.
        campaign_id: the campaign; with `recipient_id` it makes the delivery and its Message-ID.
        recipient_id: the recipient within the campaign.
        email: the address.
        name: as it stands in the To header and in the greeting.
        template: a template's name.
        variables: further values for the template.
        account: the account over which it is sent; None: the default one. The delivery's own goes before it.
        in_reply_to: the Message-ID that this mail answers.

    Returns:
        Why nothing was sent, where there was nothing to do. Where something was done, the job's result is written with it: the
        Message-ID and the server's answer, or why the mail is skipped; a refused or held mail fails its job.

    Raises:
        Discard: this mail was held before, and still is.
        Retry: the server said later, or was not to be reached; `penguinmails.smtp` says which is which; or this worker's
            settings have no such account.
        Snooze: the schema is missing or of another version; the log says so.
    """
    return send_once(
        job, Letter(campaign_id, recipient_id, email, name, template, variables or {}, account, in_reply_to)
    )


def send_once(job: Job, letter: Letter) -> dict[str, str] | None:
    """What `send_campaign_mail` does, for every task that sends; it settles the job, which must be the letter's own."""
    schema.require(job)
    attempt = _attempt(job, letter)
    account = _account(letter.account)
    try:
        mail = _mail(letter, attempt.id, account)
    except MessageError as error:
        _never(job, attempt, str(error))
        return None
    attempt = attempt.of(mail)
    settings = mail_settings()
    with job.transaction() as conn:
        standing = deliveries.begin(conn, attempt, resend=settings.ambiguous is Ambiguous.RESEND)
    if standing is not None:
        if standing.moved_from(attempt):
            return send_once(job, replace(letter, account=standing.account))
        return _not_begun(job, attempt, standing)
    handover = Handover()
    try:
        answer = connections.send(account, mail, handover)
    except BaseException as error:
        _interrupted(job, attempt, handover, error)
        raise
    _settle(job, attempt, answer, settings.ambiguous)
    return None


def skip(job: Job, letter: Letter, reason: str) -> dict[str, str]:
    """Leaves a letter unsent that was never tried: its delivery is skipped, its job completed."""
    attempt = _attempt(job, letter)
    told = {"skipped": reason}
    with job.settling(result=told) as conn:
        deliveries.add(conn, attempt)
        deliveries.close(conn, attempt, State.SKIPPED, reason, seen=deliveries.OPEN)
    return told


def _attempt(job: Job, letter: Letter) -> Attempt:
    delivery = delivery_id(letter.campaign_id, letter.recipient_id)
    whose = (delivery, letter.campaign_id, letter.recipient_id, letter.email)
    return Attempt(*whose, job.id, job.claim_token, job.worker_id, letter.account)


def _account(name: str | None) -> Account:
    """A fault of this worker's settings, not of the mail: it waits, and is sent once they are right."""
    try:
        return account_named(mail_settings(), name)
    except AccountError as error:
        raise Retry(reason=str(error)) from error


def _mail(letter: Letter, delivery: UUID, account: Account) -> Mail:
    settings = mail_settings()
    sender = (
        Sender(account.from_address, account.from_name)
        if account.from_address
        else Sender(settings.from_address, settings.from_name)
    )
    return build_mail(
        load_template(settings.templates, letter.template),
        sender,
        delivery=delivery,
        email=letter.email,
        name=letter.name,
        variables=letter.variables,
        date=datetime.now(UTC),
        campaign=letter.campaign_id,
        in_reply_to=letter.in_reply_to,
        unsubscribe=settings.unsubscribe,
        signers=settings.signers,
    )


# --- nothing is sent


def _never(job: Job, attempt: Attempt, reason: str) -> None:
    """The mail cannot be built: the job fails, and the delivery says why."""
    with job.settling(Discard(reason)) as conn:
        deliveries.add(conn, attempt)
        deliveries.close(conn, attempt, State.SKIPPED, reason, seen=deliveries.OPEN)


def _not_begun(job: Job, attempt: Attempt, standing: Standing) -> dict[str, str] | None:
    """No intent was written: the delivery is over, somebody else's, not wanted any more, or in doubt."""
    if standing.job_id != job.id:
        return {"skipped": f"delivery {attempt.id} is sent by job {standing.job_id}"}
    match standing.state:
        case State.SENDING:
            reason = (
                f"attempt {standing.attempts} of {standing.worker_id} at {standing.attempted_at:%Y-%m-%d %H:%M:%S %Z}"
                " has no outcome: the mail may have been sent or not"
            )
            with job.settling(_held(attempt, reason)) as conn:
                deliveries.close(conn, attempt, State.HELD, reason, seen=(State.SENDING,))
            return None
        case State.QUEUED | State.DEFERRED:
            reason = f"suppressed: {standing.suppressed}"
            with job.settling(result={"skipped": reason}) as conn:
                deliveries.close(conn, attempt, State.SKIPPED, reason, seen=deliveries.OPEN)
            return None
        case State.HELD:
            raise _held(attempt, "it was held before")
    return {"skipped": f"delivery {attempt.id} is {standing.state} already"}


def _held(attempt: Attempt, reason: str) -> Discard:
    return Discard(
        f"delivery {attempt.id} is held, {reason}; `penguinmails held` lists it, `release` sends it again, `drop` does not"
    )


# --- the server has said something, or nothing


def _settle(job: Job, attempt: Attempt, answer: Answer, policy: Ambiguous) -> None:
    last = job.attempt_count >= job.max_attempts
    if answer.verdict is Verdict.ACCEPTED:
        _sent(job, attempt, answer)
    elif answer.verdict is Verdict.REJECTED:
        _bounce(job, attempt, answer, str(answer))
    elif answer.ambiguous and (policy is Ambiguous.HOLD or last):
        with job.settling(_held(attempt, str(answer))) as conn:
            deliveries.end(conn, attempt, _result(State.HELD, answer, str(answer)))
    elif last and answer.is_about_mail:
        _bounce(job, attempt, answer, f"{answer}; attempt {job.attempt_count} was the last")
    else:
        with job.transaction() as conn:
            deliveries.end(conn, attempt, _result(State.DEFERRED, answer, str(answer)))
        raise Retry(_pause_seconds(job), str(answer))


def _pause_seconds(job: Job) -> float:
    """Until the next attempt, after the server has said later or was not reached."""
    policy = replace(LATER, base_seconds=mail_settings().retry_base_seconds)
    return policy.delay(job.attempt_count, random.random())  # noqa: S311 - jitter


def _interrupted(job: Job, attempt: Attempt, handover: Handover, error: BaseException) -> None:
    """The timeout or a cancel has ended the conversation: write down what is known of the mail; else the intent stays."""
    if handover.answer is not None and handover.answer.verdict is Verdict.ACCEPTED:
        result = _result(State.SENT, handover.answer)
    elif handover.may_be_delivered:
        return
    else:
        why = f"{type(error).__name__}: {error}".rstrip(": ")
        result = Result(State.DEFERRED, None, None, "", f"interrupted at {handover.stage} by {why}")
    with job.transaction() as conn:
        deliveries.end(conn, attempt, result)


def _sent(job: Job, attempt: Attempt, answer: Answer) -> None:
    told = {"message_id": attempt.message_id, "answer": f"{answer.code} {answer.text}"}
    sent = _result(State.SENT, answer)
    try:
        with job.settling(result=told) as conn:
            deliveries.end(conn, attempt, sent)
    except SettleRefused:
        # The job was taken from this worker, and its new owner has found the intent; but this one knows.
        with job.transaction() as conn:
            deliveries.end(conn, attempt, sent)
        raise


def _bounce(job: Job, attempt: Attempt, answer: Answer, reason: str) -> None:
    """Fail the job and hand the refusal on, in one transaction: no failed mail without its bounce, no bounce twice."""
    meaning = classify_answer(answer.code, answer.text, stage=answer.stage)
    payload = {
        "source": "smtp",
        "job_id": job.id,
        "delivery_id": attempt.id,
        "campaign_id": attempt.campaign_id,
        "recipient_id": attempt.recipient_id,
        "email": attempt.email,
        "message_id": attempt.message_id,
        "stage": answer.stage,
        "code": answer.code,
        "status": answer.status or None,
        "answer": answer.text,
        "verdict": meaning.verdict,
        "reason": meaning.reason,
    }
    with job.settling(Discard(reason)) as conn:
        deliveries.end(conn, attempt, _result(State.BOUNCED, answer, reason))
        app.enqueue(BOUNCE, payload, conn=conn)


def _result(state: State, answer: Answer, reason: str | None = None) -> Result:
    return Result(state, answer.code or None, answer.status or None, answer.text, reason)


@app.on_worker_stop
def _say_goodbye() -> None:
    connections.close()
