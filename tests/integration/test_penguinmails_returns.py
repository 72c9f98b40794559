"""What comes back: inbound mails stored once, notifications and refusals at their deliveries, and addresses suppressed or not."""

import os
import sys
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4, uuid5

import psycopg
import pytest

from penguinmails import cli, deliveries, sending
from penguinmails.bounces import process_bounce
from penguinmails.deliveries import Attempt, Result, State
from penguinmails.message import delivery_id
from penguinmails.mime import MAX_MESSAGE_BYTES
from penguinmails.processing import leave_raw, process_inbound
from penguinmails.settings import mail_settings
from penguinmails.unsubscribe import unsubscribe_token
from pmqd import Discard, SettleRefused
from tests.mail_jobs import ARGUMENTS, CAMPAIGN, RECIPIENT, Port, a_job, counted, handed
from tests.raw_mails import ZOE, a_complaint, a_mail, a_notification
from tests.smtp_servers import Scripted, serving

KEY = "0123456789abcdef"


class Returns:
    """A database with both schemas, a folder where mails arrive, and the two handlers."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn, self.folder = dsn, folder
        self.port = Port(dsn)
        self.conn = psycopg.connect(dsn, autocommit=True)

    def sent(self, email: str = ZOE, *, state: State | None = State.SENT, campaign: UUID = CAMPAIGN) -> str:
        """A delivery that was handed over, or whose attempt has no outcome (None); its Message-ID."""
        recipient = uuid5(campaign, email)
        delivery = delivery_id(campaign, recipient)
        message_id = f"<{delivery}@example.org>"
        attempt = Attempt(delivery, campaign, recipient, email, uuid4(), uuid4(), "w1", message_id=message_id)
        with self.conn.transaction():
            assert deliveries.begin(self.conn, attempt, resend=False) is None
            if state is not None:
                assert deliveries.end(self.conn, attempt, Result(state, 250, "2.0.0", "taken"))
        self.attempt = attempt
        return message_id

    def process(self, raw: bytes, *, port: Port | None = None) -> dict[str, Any]:
        """Hands a raw mail in by a file; the job's result."""
        path = self.folder / f"{uuid4()}.eml"
        path.write_bytes(raw)
        return self.run(process_inbound, {"path": str(path)}, port)

    def come_back(self, raw: bytes) -> dict[str, Any]:
        """A notification through both queues; the result of the second."""
        (job,) = self.enqueued("id = %s", self.process(raw)["bounce_job"])
        return self.run(process_bounce, job[1])

    def run(self, handler: Any, payload: Any, port: Port | None = None) -> dict[str, Any]:
        """Runs a handler; the job's result."""
        port = port or self.port
        handler(handed(port, payload))
        result = port.ends[-1]
        assert isinstance(result, dict)
        return result

    def enqueued(self, which: str, *values: Any) -> list[Any]:
        """Queue and payload of jobs."""
        query = f"select queue_name, payload from pmqd.jobs where {which} order by id"
        return self.conn.execute(query.encode(), values).fetchall()

    def one(self, query: str, *values: Any) -> Any:
        """The only row of a query; of one column its value."""
        (row,) = self.conn.execute(query.encode(), values).fetchall()
        return row[0] if len(row) == 1 else row

    def state(self, email: str = ZOE) -> str:
        """Of the delivery to an address."""
        return str(self.one("select state from penguinmails.deliveries where email = %s", email))

    def suppressed(self) -> dict[str, str]:
        """Address and reason."""
        return dict(self.conn.execute("select address, reason from penguinmails.suppressions").fetchall())


@pytest.fixture
def returns(mail_database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Returns]:
    """The database and the settings' defaults; at the end the campaigns' sums equal the rows."""
    for name in [name for name in os.environ if name.startswith("PENGUINMAILS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PMQD_POSTGRES__DSN", mail_database)
    mail_settings.cache_clear()
    made = Returns(mail_database, tmp_path)
    yield made
    sums, rows = counted(made.conn)
    assert sums == rows
    made.conn.close()
    mail_settings.cache_clear()


def test_a_mail_is_stored_once(returns: Returns) -> None:
    """By path and by what lies in the database, twice and with other trace fields: one content, one message, all that it says."""
    raw = a_mail(
        "To: news@example.org", "Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=", "Message-ID: <1@example.com>"
    )
    first = returns.process(raw)
    assert (first["kind"], first["is_new"], first["delivery"]) == ("message", True, None)
    assert returns.process(b"Received: from elsewhere\r\n" + raw)["is_new"] is False
    with psycopg.connect(returns.dsn) as conn:
        payload = {"content": leave_raw(conn, raw), "mailbox": "news@example.org"}
    assert returns.run(process_inbound, payload)["message"] == first["message"]
    row = returns.one("select subject, sender, recipients, kind from penguinmails.email_messages")
    assert row == ("Grüße", ZOE, ["news@example.org"], "message")
    content = returns.one("select raw, text, defects, headers -> 0 from penguinmails.email_contents")
    assert content == (raw, "Hello\r\n", [], ["from", "Zoe <zoe@example.com>"])
    assert returns.enqueued("true") == []


def test_what_was_left_in_the_database_is_read_there(returns: Returns) -> None:
    """A producer in SQL inserts raw bytes under a hash of its own; the row is filled in, and the message refers to it."""
    raw = a_mail("Message-ID: <2@example.com>", body="From the database")
    insert = "insert into penguinmails.email_contents (hash, size, raw) values (sha256(%s), %s, %s) returning encode(hash, 'hex')"
    key = returns.one(insert, raw, len(raw), raw)
    assert returns.run(process_inbound, {"content": key})["is_new"] is True
    assert returns.one("select text from penguinmails.email_contents") == "From the database\r\n"
    assert returns.one("select encode(content_hash, 'hex') from penguinmails.email_messages") == key


@pytest.mark.parametrize("field", ["In-Reply-To: {}", "References: {} <other@example.com>"])
def test_a_reply_finds_the_delivery_that_it_answers(returns: Returns, field: str) -> None:
    """By either field; a reply to something unknown, or to a mail that was never sent, is kept without."""
    about = returns.sent()
    found = returns.process(a_mail(field.format(about), "Subject: Re: news"))
    assert (found["kind"], str(found["delivery"])) == ("reply", about[1:].partition("@")[0])
    for other in (
        "<somebody@example.com>",
        f"<{uuid4()}@example.org>",
        about.replace("example.org", "x.org"),
    ):
        assert returns.process(a_mail(field.format(other)))["delivery"] is None
    assert returns.state() == "sent"


def test_a_hard_bounce_is_counted_once(returns: Returns) -> None:
    """Delivery, sums, suppression; the same notification again makes no second job, and its job again changes nothing."""
    raw = a_notification(returns.sent())
    assert returns.process(raw)["bounce_job"] == returns.process(raw)["bounce_job"]
    ((queue, payload),) = returns.enqueued("true")
    assert (queue, payload["source"]) == ("bounce:process", "notification")
    done = returns.run(process_bounce, payload)
    assert (done["kind"], done["state"], done["suppressed"]) == ("hard", "bounced", "hard_bounce")
    assert returns.suppressed() == {ZOE: "hard_bounce"}
    assert counted(returns.conn)[0] == {"bounced": 1}
    row = returns.one("select kind, source, reason, smtp_code, enhanced_code, text from penguinmails.bounces")
    assert row == ("hard", "notification", "no such address", 550, "5.1.1", "550 5.1.1 no such user")

    assert cli.main(["suppress", "remove", "ZOE@example.com"]) == 0
    assert returns.run(process_bounce, payload)["ignored"] == "it was told before"
    assert returns.suppressed() == {}
    assert returns.one("select count(*) from penguinmails.bounces") == 1


def test_the_daemon_s_role_suffices(returns: Returns) -> None:
    """Both handlers need no more than `penguinmails_daemon` and `pmqd_daemon`."""
    login = f"mail_daemon_{uuid4().hex[:8]}"
    returns.conn.execute(f"create role {login} login in role pmqd_daemon, penguinmails_daemon".encode())
    try:
        port = Port(psycopg.conninfo.make_conninfo(returns.dsn, user=login))
        returns.process(a_notification(returns.sent()), port=port)
        ((_, payload),) = returns.enqueued("true")
        assert returns.run(process_bounce, payload, port)["suppressed"] == "hard_bounce"
        with psycopg.connect(port.dsn) as conn:
            key = leave_raw(conn, a_mail())
        assert returns.run(process_inbound, {"content": key}, port)["is_new"] is True
    finally:
        returns.conn.execute(f"drop role {login}".encode())


def test_a_worker_that_loses_its_job_has_written_nothing(returns: Returns) -> None:
    """Both queues: the writes go with the end of the job, so whoever runs it next does them, once."""
    taken = Port(returns.dsn, owned=False)
    raw = a_notification(returns.sent())
    with pytest.raises(SettleRefused):
        returns.process(raw, port=taken)
    assert returns.enqueued("true") == []
    assert returns.one("select count(*) from penguinmails.email_messages") == 0
    returns.process(raw)
    ((_, payload),) = returns.enqueued("true")
    with pytest.raises(SettleRefused):
        returns.run(process_bounce, payload, taken)
    assert (returns.state(), returns.suppressed()) == ("sent", {})
    returns.run(process_bounce, payload)
    assert (returns.state(), returns.suppressed()) == ("bounced", {ZOE: "hard_bounce"})


def test_a_forged_notification_suppresses_nobody(returns: Returns) -> None:
    """No id of ours, an id that nobody has sent under, or a failure at another address than the delivery's."""
    about = returns.sent()
    for forged in (f"<{uuid4()}@example.org>", about.replace("example.org", "evil.example"), "<x@y>"):
        ignored = returns.come_back(a_notification(forged))["ignored"]
        assert ignored == "no id in it is that of a mail which was sent"
    assert (returns.state(), returns.suppressed()) == ("sent", {})
    done = returns.come_back(a_notification(about, to="boss@example.com"))
    assert (done["kind"], done["suppressed"]) == ("soft", None)
    assert (returns.state(), returns.suppressed()) == ("bounced", {})


def test_what_is_no_failure_changes_nothing(returns: Returns) -> None:
    """Delayed, delivered, and feedback that is no complaint: stored, and that is all."""
    about = returns.sent()
    for raw in (
        a_notification(about, action="delayed", status="4.4.1"),
        a_notification(about, action="delivered", status="2.0.0"),
        a_complaint(about, "not-spam"),
    ):
        assert "does not say that" in returns.come_back(raw)["ignored"]
    assert (returns.state(), returns.suppressed()) == ("sent", {})
    assert returns.one("select count(*) from penguinmails.bounces") == 0


def test_a_complaint_suppresses(returns: Returns) -> None:
    """Also of a mail that has bounced, and no later bounce takes it back."""
    about = returns.sent()
    returns.come_back(a_notification(about, status="4.2.2", said="full"))
    assert (returns.state(), returns.suppressed()) == ("bounced", {})
    assert returns.come_back(a_complaint(about))["suppressed"] == "complaint"
    returns.come_back(a_notification(about))
    assert (returns.state(), returns.suppressed()) == ("complained", {ZOE: "complaint"})


def test_soft_bounces_suppress_on_the_fifth_day(returns: Returns, monkeypatch: pytest.MonkeyPatch) -> None:
    """Days count, not mails, and only with reasons that may be the address's; 0 never suppresses."""

    def full(status: str = "4.2.2", said: str = "mailbox full") -> Any:
        about = returns.sent(campaign=uuid4())
        return returns.come_back(a_notification(about, status=status, said=said))["suppressed"]

    def age(days: int) -> None:
        returns.conn.execute(
            "update penguinmails.bounces set occurred_at = occurred_at - make_interval(days => %s)", [days]
        )

    for _ in range(4):
        assert (full(), full()) == (None, None)
        age(1)
    assert full("5.7.1", "rejected by policy") is None
    age(26)
    assert full() is None  # those of more than 30 days ago are forgotten
    age(-26)
    monkeypatch.setenv("PENGUINMAILS_SOFT_BOUNCES_TO_SUPPRESS", "0")
    mail_settings.cache_clear()
    assert full() is None
    monkeypatch.delenv("PENGUINMAILS_SOFT_BOUNCES_TO_SUPPRESS")
    mail_settings.cache_clear()
    assert full() == "soft_bounces"
    assert returns.suppressed() == {ZOE: "soft_bounces"}


def test_a_notification_may_come_before_the_yes_is_written(returns: Returns) -> None:
    """The server said yes and returned the mail at once: bounced, and the attempt's own end does not undo it."""
    about = returns.sent(state=None)
    assert returns.come_back(a_notification(about))["state"] == "bounced"
    with returns.conn.transaction():
        assert not deliveries.end(returns.conn, returns.attempt, Result(State.SENT, 250, None, "taken"))
    assert returns.state() == "bounced"


def test_a_refusal_while_sending_suppresses(returns: Returns, monkeypatch: pytest.MonkeyPatch) -> None:
    """The payload that sending writes is what bounce:process takes; a refused sender is not the address's fault."""
    answers = ["550 5.1.1 no such user", "550 5.7.1 your address is blocked"]
    with serving(Scripted(rcpt=answers)) as server:
        monkeypatch.setenv("PENGUINMAILS_SMTP_PORT", str(server.port))
        mail_settings.cache_clear()
        for email in (ZOE, "bo@example.com"):
            arguments = {**ARGUMENTS, "recipient_id": uuid5(RECIPIENT, email), "email": email}
            sending.send_campaign_mail(job=a_job(Port(returns.dsn)), **arguments)
        sending.connections.close()
    (first, second) = (payload for _, payload in returns.enqueued("queue_name = 'bounce:process'"))
    assert returns.run(process_bounce, first)["suppressed"] == "hard_bounce"
    assert returns.run(process_bounce, first)["ignored"] == "it was told before"
    assert returns.run(process_bounce, second)["suppressed"] is None
    assert returns.suppressed() == {ZOE: "hard_bounce"}
    unknown = returns.run(process_bounce, {**first, "delivery_id": str(uuid4())})
    assert "there is no delivery" in unknown["ignored"]


@pytest.mark.parametrize("raw", [b"", b"\x00\xff\xfe" * 50, b"no header at all\r\nreally", b"\r\n\r\nbody"])
def test_malformed_mail_is_kept_and_marked(returns: Returns, raw: bytes) -> None:
    """No crash, the bytes as they came."""
    assert returns.process(raw)["kind"] == "malformed"
    assert returns.one("select raw from penguinmails.email_contents") == raw


def test_defects_are_named(returns: Returns) -> None:
    """A mail that is one, but broken."""
    broken = a_mail("Content-Type: multipart/mixed; boundary=b", body="--b\r\n\r\nnever closed")
    assert returns.process(broken)["kind"] == "message"
    assert returns.one("select defects from penguinmails.email_contents")


def test_what_cannot_be_read_fails_for_good(returns: Returns) -> None:
    """A missing file, a folder, a FIFO, too many bytes, no such content, a payload that names nothing: one clear line."""
    os.mkfifo(returns.folder / "fifo")
    with (returns.folder / "big").open("wb") as file:
        file.truncate(MAX_MESSAGE_BYTES + 1)
    for payload, words in (
        ({"path": str(returns.folder / "nosuch")}, "nosuch: No such file"),
        ({"path": str(returns.folder)}, "Is a directory"),
        ({"path": str(returns.folder / "fifo")}, "not a regular file"),
        ({"path": str(returns.folder / "big")}, "more than 26,214,400 bytes"),
        ({"content": "0" * 64}, "there is no content 000"),
        ({"path": "relative"}, "path: String should match"),
        ({}, "one of path"),
        ("text", "valid dictionary"),
    ):
        with pytest.raises(Discard, match=words):
            process_inbound(handed(returns.port, payload))
    told: list[tuple[Any, str]] = [
        ({"source": "notification", "message": str(uuid4())}, "there is no message"),
        ({"source": "smtp"}, "job_id: Field required"),
        (None, "valid dictionary"),
    ]
    for given, words in told:
        with pytest.raises(Discard, match=words):
            process_bounce(handed(returns.port, given))


def test_unsubscribing_by_mail(returns: Returns, monkeypatch: pytest.MonkeyPatch) -> None:
    """The subject that List-Unsubscribe offers suppresses the delivery's address; another token nobody's."""
    for name, value in {"URL": "https://example.org/{token}", "KEYS": f'["{KEY}"]', "MAILTO": ""}.items():
        monkeypatch.setenv(f"PENGUINMAILS_UNSUBSCRIBE_{name}", value)
    mail_settings.cache_clear()
    delivery = UUID(returns.sent()[1:].partition("@")[0])
    for key, found in ((b"another key, 16 bytes", None), (KEY.encode(), delivery)):
        subject = f"Subject: unsubscribe {unsubscribe_token(delivery, key)}"
        assert returns.process(a_mail(subject)).get("unsubscribed") == found
    assert returns.suppressed() == {ZOE: "unsubscribe"}


def test_the_commands(
    returns: Returns, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`inbound` by path, into the database and from stdin; `suppress` in its three forms; what is wrong is one line."""
    file = returns.folder / "a.eml"
    file.write_bytes(a_mail("Message-ID: <3@example.com>"))
    assert cli.main(["inbound", str(file), "--mailbox", "news@example.org"]) == 0
    assert cli.main(["inbound", "--store", str(file)]) == 0
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(a_mail("Message-ID: <4@example.com>"))))
    assert cli.main(["inbound", "-"]) == 0
    jobs = [payload for _, payload in returns.enqueued("queue_name = 'email:processing'")]
    assert jobs[0] == {"path": str(file), "mailbox": "news@example.org"}
    assert [returns.run(process_inbound, payload)["is_new"] for payload in jobs] == [True, False, True]
    assert cli.main(["inbound", str(file), str(returns.folder / "nosuch")]) == 1
    assert len(returns.enqueued("true")) == 3

    assert cli.main(["suppress", "add", "Bo@Example.com", "bo@example.com", ZOE]) == 0
    assert cli.main(["suppress", "add", "no address"]) == 1
    assert cli.main(["suppress", "list", "--reason", "manual"]) == 0
    assert cli.main(["suppress", "remove", "BO@example.com", "nobody@example.com"]) == 0
    said = capsys.readouterr()
    assert "2 added" in said.out
    assert "2 suppressed" in said.out
    assert "1 removed" in said.out
    assert "nosuch: No such file" in said.err
    assert len(said.err.splitlines()) == 2
    assert returns.suppressed() == {ZOE: "manual"}
