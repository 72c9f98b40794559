"""The application: what penguinmails does with the jobs of its queues."""

from datetime import UTC, datetime
from uuid import UUID

from penguinmails.message import (
    Mail,
    MessageError,
    Sender,
    build_mail,
    delivery_id,
    load_template,
)
from penguinmails.settings import mail_settings
from penguinmails.smtp import Answer, Connections, Verdict, account_of
from pmqd import App, Discard, Job, Retry, RetryPolicy

INBOUND = "email:processing"
SENDING = "email-sending"
WARMUP = "warmup:process"
BOUNCE = "bounce:process"
QUEUES = (INBOUND, SENDING, WARMUP, BOUNCE)
"""All queues of the company, most important first."""

# Servers that say "later" (greylisting, a full mailbox) mean minutes, not the seconds of pmqd's own default.
LATER = RetryPolicy(base_seconds=60, max_seconds=3600)

app = App()
connections = Connections()


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
) -> dict[str, str] | None:
    """Send one campaign's mail to one recipient.

    The mail is sent at least once: a worker that dies after the server's yes and before its own settle sends it again,
    with the same Message-ID.

    Args:
        job: the job itself.
        campaign_id: the campaign; with `recipient_id` it makes the Message-ID.
        recipient_id: the recipient within the campaign.
        email: the address.
        name: as it stands in the To header and in the greeting.
        template: a template's name.
        variables: further values for the template.

    Returns:
        The Message-ID and the server's answer; None if the server refused for good (the job is failed then).

    Raises:
        Discard: this mail can never be built.
        Retry: the server said later, or was not to be reached, or its answer was lost; `penguinmails.smtp` says which
            is which.
    """
    delivery = delivery_id(campaign_id, recipient_id)
    mail = _mail(campaign_id, delivery, email, name, template, variables or {})
    answer = connections.send(account_of(mail_settings()), mail)
    if answer.verdict is Verdict.DEFERRED:
        raise Retry(reason=str(answer))
    if answer.verdict is Verdict.REJECTED:
        _bounce(job, campaign_id, recipient_id, mail, answer)
        return None
    return {"message_id": mail.message_id, "answer": f"{answer.code} {answer.text}"}


def _mail(
    campaign: UUID, delivery: UUID, email: str, name: str, template: str, variables: dict[str, str]
) -> Mail:
    settings = mail_settings()
    try:
        return build_mail(
            load_template(settings.templates, template),
            Sender(settings.from_address, settings.from_name),
            delivery=delivery,
            email=email,
            name=name,
            variables=variables,
            date=datetime.now(UTC),
            campaign=campaign,
            unsubscribe=settings.unsubscribe,
            signers=settings.signers,
        )
    except MessageError as error:
        raise Discard(str(error)) from error


def _bounce(job: Job, campaign_id: UUID, recipient_id: UUID, mail: Mail, answer: Answer) -> None:
    """Fail the job and hand the refusal on, in one transaction: no failed mail without its bounce, no bounce twice."""
    payload = {
        "source": "smtp",
        "job_id": job.id,
        "campaign_id": campaign_id,
        "recipient_id": recipient_id,
        "email": mail.recipient,
        "message_id": mail.message_id,
        "stage": answer.stage,
        "code": answer.code,
        "answer": answer.text,
    }
    with job.settling(Discard(str(answer))) as conn:
        app.enqueue(BOUNCE, payload, conn=conn)


@app.on_worker_stop
def _say_goodbye() -> None:
    connections.close()
