"""The mails that come back in the demo: written as servers and people write them, from what the receiving server has seen."""

from collections.abc import Iterator, Mapping
from email.message import Message
from email.parser import BytesHeaderParser
from email.utils import formatdate
from pathlib import Path
from typing import Any
from uuid import uuid4

from psycopg import Connection

from penguinmails.demo.fates import Fate, Fates
from penguinmails.processing import request_inbound

HOME = "penguins@example.com"
GARBAGE = b"\x00\xff this is no mail \xfe\r\n" * 20

NOTIFICATION = """\
From: Mail Delivery System <MAILER-DAEMON@receiver.localhost>
To: {home}
Subject: Undelivered Mail Returned to Sender
Date: {date}
Message-ID: <{id}@receiver.localhost>
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status; boundary="=part"

--=part
Content-Type: text/plain; charset=utf-8

Your mail could not be delivered to {recipient}.

--=part
Content-Type: message/delivery-status

Reporting-MTA: dns; receiver.localhost

Final-Recipient: rfc822; {recipient}
Action: failed
Status: {status}
Diagnostic-Code: smtp; 550 {status} {said}

--=part
Content-Type: text/rfc822-headers

Message-ID: {about}

--=part--
"""
COMPLAINT = """\
From: Feedback <feedback@receiver.localhost>
To: {home}
Subject: FW: {subject}
Date: {date}
Message-ID: <{id}@receiver.localhost>
MIME-Version: 1.0
Content-Type: multipart/report; report-type=feedback-report; boundary="=part"

--=part
Content-Type: text/plain; charset=utf-8

A recipient has called this mail junk.

--=part
Content-Type: message/feedback-report

Feedback-Type: abuse
User-Agent: demo/1.0
Version: 1

--=part
Content-Type: text/rfc822-headers

Message-ID: {about}

--=part--
"""
REPLY = """\
From: {recipient}
To: {home}
Subject: Re: {subject}
Date: {date}
Message-ID: <{id}@receiver.localhost>
In-Reply-To: {about}
References: {about}
Content-Type: text/plain; charset=utf-8

Thank you!
"""


def hand_in(conn: Connection[Any], headers: Mapping[str, bytes], fates: Fates, folder: Path) -> int:
    """Put all mails that come back into files, and one job for each into `email:processing`.

    Args:
        conn: in a transaction.
        headers: of each mail that the server has taken, by recipient.
        fates: who returns, answers and complains.
        folder: for the files; it must exist.

    Returns:
        How many they are.
    """
    number = 0
    for number, raw in enumerate(_mails(headers, fates), start=1):
        path = folder / f"{number}.eml"
        path.write_bytes(raw)
        request_inbound(conn, path=path, mailbox=HOME)
    return number


def _mails(headers: Mapping[str, bytes], fates: Fates) -> Iterator[bytes]:
    """One for each whose fate it is; and what must change nothing: one of them again, a forged one, and bytes that are no mail."""
    again = None
    for recipient in sorted(headers):
        fate = fates.of.get(recipient)
        if fate is Fate.RETURNED_HARD:
            again = _written(NOTIFICATION, recipient, headers, status="5.1.1", said="no such user")
            yield again
        elif fate is Fate.RETURNED_SOFT:
            yield _written(NOTIFICATION, recipient, headers, status="5.2.2", said="mailbox full")
        elif fate is Fate.COMPLAINED:
            yield _written(COMPLAINT, recipient, headers)
        elif fate is Fate.ANSWERED:
            yield _written(REPLY, recipient, headers)
    if again is not None:
        yield again
    victim = min(fates.who(Fate.TAKEN))
    invented = {victim: f"Message-ID: <{uuid4()}@example.com>\r\n\r\n".encode()}
    yield _written(NOTIFICATION, victim, invented, status="5.1.1", said="no such user")
    yield GARBAGE


def _written(form: str, recipient: str, headers: Mapping[str, bytes], **more: str) -> bytes:
    original: Message = BytesHeaderParser().parsebytes(headers[recipient])
    text = form.format(
        home=HOME,
        recipient=recipient,
        about=original["Message-ID"],
        subject="Your mail",
        date=formatdate(),
        id=uuid4(),
        **more,
    )
    return text.replace("\n", "\r\n").encode()
