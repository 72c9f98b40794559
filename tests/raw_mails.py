"""Raw mails as they come in: plain ones, delivery status notifications and feedback reports."""

from uuid import uuid4

ZOE = "zoe@example.com"


def a_mail(*fields: str, body: str = "Hello") -> bytes:
    """A plain mail with these fields beside From and Date."""
    own = ("From: Zoe <zoe@example.com>", "Date: Tue, 01 Sep 2026 10:00:00 +0000", *fields)
    return ("\r\n".join(own) + f"\r\n\r\n{body}\r\n").encode()


def a_notification(
    about: str, *, to: str = ZOE, action: str = "failed", status: str = "5.1.1", said: str = "no such user"
) -> bytes:
    """A delivery status notification (RFC 3464) with the header of the mail that came back."""
    return (
        f"From: MAILER-DAEMON@mx.example.com\r\nTo: news@example.org\r\nSubject: Undelivered Mail\r\nMessage-ID: <{uuid4()}@mx>\r\n"
        "Content-Type: multipart/report; report-type=delivery-status; boundary=b\r\n\r\n--b\r\nContent-Type: text/plain\r\n\r\nSorry.\r\n"
        "--b\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; mx.example.com\r\n\r\n"
        f"Final-Recipient: rfc822; {to}\r\nAction: {action}\r\nStatus: {status}\r\nDiagnostic-Code: smtp; 550 {status} {said}\r\n\r\n"
        f"--b\r\nContent-Type: text/rfc822-headers\r\n\r\nMessage-ID: {about}\r\nTo: {to}\r\n\r\n--b--\r\n"
    ).encode()


def a_complaint(about: str, kind: str = "abuse") -> bytes:
    """A feedback report (RFC 5965) that hides who complained."""
    return (
        f"From: fbl@example.com\r\nSubject: FW: news\r\nMessage-ID: <{uuid4()}@fbl>\r\n"
        "Content-Type: multipart/report; report-type=feedback-report; boundary=b\r\n\r\n--b\r\nContent-Type: text/plain\r\n\r\nAbuse.\r\n"
        f"--b\r\nContent-Type: message/feedback-report\r\n\r\nFeedback-Type: {kind}\r\nUser-Agent: fbl/1\r\nVersion: 1\r\n\r\n"
        f"--b\r\nContent-Type: message/rfc822\r\n\r\nMessage-ID: {about}\r\nSubject: news\r\n\r\nHi\r\n--b--\r\n"
    ).encode()
