"""Sending at most once: intents, held mails and what a person decides, suppressions, and sums that equal the rows."""

import contextlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from penguinmails import cli, deliveries, held, schema, sending
from penguinmails.campaign import (
    Recipient,
    Recipients,
    create_campaign,
    process_campaign,
    request_campaign,
    start_campaign,
)
from penguinmails.deliveries import Attempt, Result, State, Suppression
from penguinmails.demo.receiver import Receiver, receiving
from penguinmails.message import delivery_id
from penguinmails.report import read_report
from penguinmails.sending import send_campaign_mail
from penguinmails.settings import mail_settings
from pmqd import Discard, JobTimeout, Retry, SchemaError, SettleRefused, Snooze
from tests.mail_jobs import ARGUMENTS, CAMPAIGN, RECIPIENT, Port, a_job, counted
from tests.smtp_servers import Lines, Scripted, interrupted, raw_server, serving, speak

DELIVERY = delivery_id(CAMPAIGN, RECIPIENT)


class Mailing:
    """A database with both schemas, and settings that lead to an SMTP server."""

    def __init__(self, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.dsn, self._monkeypatch = dsn, monkeypatch
        self.port = Port(dsn)
        self.conn = psycopg.connect(dsn, autocommit=True)
        self.use(FROM_ADDRESS="news@example.org", HELO_NAME="test.local")

    def use(self, **settings: str) -> None:
        """Sets PENGUINMAILS_* variables."""
        for name, value in settings.items():
            self._monkeypatch.setenv(f"PENGUINMAILS_{name}", value)
        mail_settings.cache_clear()

    def send(self, job: Any = None, **changes: Any) -> Any:
        """Runs the handler; an attempt of a job of its own unless one is given."""
        return send_campaign_mail(job=job or a_job(self.port), **{**ARGUMENTS, **changes})

    def cut(self, **changes: Any) -> Any:
        """An attempt that was cut after its intent: the job, as the next run of it finds it."""
        job = a_job(self.port, **changes)
        with psycopg.connect(self.dsn) as conn:
            assert deliveries.begin(conn, self.attempt(job), resend=False) is None
        return self.again(job)

    def again(self, job: Any, **changes: Any) -> Any:
        """The same job under its next claim."""
        return a_job(self.port, id=job.id, attempt_count=2, **changes)

    def attempt(self, job: Any) -> Attempt:
        """The attempt of a job."""
        return Attempt(
            DELIVERY, CAMPAIGN, RECIPIENT, "zoe@example.com", job.id, job.claim_token, job.worker_id
        )

    def stands(self, delivery: UUID = DELIVERY) -> tuple[str, str | None]:
        """State and reason of a delivery."""
        query = "select state, reason from penguinmails.deliveries where id = %s"
        row = self.conn.execute(query, [delivery]).fetchone()
        assert row is not None
        return row[0], row[1]


@pytest.fixture
def mailing(mail_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mailing]:
    """The database, settings, and nothing left of either."""
    monkeypatch.setenv("PMQD_POSTGRES__DSN", mail_database)
    made = Mailing(mail_database, monkeypatch)
    yield made
    sums, rows = counted(made.conn)
    assert sums == rows
    made.conn.close()
    sending.connections.close()
    mail_settings.cache_clear()


@pytest.fixture
def receiver(mailing: Mailing) -> Iterator[Receiver]:
    """A server that says yes to every mail."""
    with receiving(Receiver()) as receiver:
        mailing.use(SMTP_PORT=str(receiver.port))
        yield receiver
        sending.connections.close()


def test_an_intent_without_outcome_is_held_and_a_person_decides(mailing: Mailing, receiver: Receiver) -> None:
    """Not sent by any further run; listed; released it is sent once, by a job of its own; the first job is done with it."""
    job = mailing.cut()
    mailing.send(job)
    assert mailing.stands()[0] == "held"
    assert "may have been sent or not" in mailing.port.ends[0]
    with pytest.raises(Discard, match="held before"):
        mailing.send(mailing.again(job))
    assert receiver.count == 0
    payload = send_campaign_mail.arguments(**ARGUMENTS).decode()
    _insert_job(mailing, job.id, payload)
    mailing.conn.execute("update pmqd.jobs set status = 'failed', ready = false, failed_at = now()")

    with psycopg.connect(mailing.dsn) as conn:
        (found,) = held.read_held(conn)
        assert (found.id, found.email) == (DELIVERY, "zoe@example.com")
        assert held.release(conn, [DELIVERY]) == 1
    assert mailing.stands() == ("queued", None)
    query = "select id, payload::text from pmqd.jobs where status = 'queued'"
    ((new_job, new_payload),) = mailing.conn.execute(query).fetchall()
    assert new_payload == mailing.conn.execute("select %s::jsonb::text", [payload]).fetchone()[0]  # type: ignore[index]
    assert mailing.send(mailing.again(job)) == {"skipped": f"delivery {DELIVERY} is sent by job {new_job}"}
    mailing.send(a_job(mailing.port, id=new_job))
    assert receiver.message_ids == {f"<{DELIVERY}@example.org>": 1}
    assert mailing.stands() == ("sent", None)
    assert mailing.send(a_job(mailing.port, id=new_job)) == {
        "skipped": f"delivery {DELIVERY} is sent already"
    }


def test_resend_sends_an_intent_without_outcome_again(mailing: Mailing, receiver: Receiver) -> None:
    """The setting `ambiguous=resend`: at least once, with the same Message-ID."""
    mailing.use(AMBIGUOUS="resend")
    mailing.send(mailing.cut())
    assert (mailing.stands()[0], receiver.message_ids) == ("sent", {f"<{DELIVERY}@example.org>": 1})


def test_dropping_and_wrong_decisions(mailing: Mailing) -> None:
    """A dropped mail is skipped; what is not held, or has no job any more, is named and nothing is changed."""
    mailing.send(mailing.cut())
    stranger = uuid4()
    with psycopg.connect(mailing.dsn) as conn:
        for decide in (held.release, held.drop):
            with pytest.raises(held.HeldError, match=f"delivery {stranger} is not held"), conn.transaction():
                decide(conn, [DELIVERY, stranger])
        with pytest.raises(held.HeldError, match="no longer kept"), conn.transaction():
            held.release(conn, [DELIVERY])
        assert held.drop(conn, [DELIVERY, DELIVERY]) == 1
    assert mailing.stands() == ("skipped", held.DROPPED)


def test_an_intent_of_a_job_that_has_ended_is_found(mailing: Mailing) -> None:
    """Cancelled in the middle of the conversation: no run will come by, so the list holds it. One that runs is left alone."""
    job = mailing.cut()
    _insert_job(mailing, job.id, "{}")
    with psycopg.connect(mailing.dsn) as conn:
        assert held.read_held(conn) == []
    ended = "update pmqd.jobs set status = 'cancelled', ready = false, cancelled_at = now() where id = %s"
    mailing.conn.execute(ended, [job.id])
    with psycopg.connect(mailing.dsn) as conn:
        assert [each.id for each in held.read_held(conn, CAMPAIGN)] == [DELIVERY]
        assert held.read_held(conn, uuid4()) == []


def test_who_knows_better_writes_it_down(mailing: Mailing, receiver: Receiver) -> None:
    """The job was taken in the middle, and its new owner held the mail; the old one hears the yes: sent, not held."""
    job = a_job(Port(mailing.dsn, owned=False))
    accept = sending.connections.send

    def held_meanwhile(*arguments: Any) -> Any:
        answer = accept(*arguments)
        mailing.send(mailing.again(job))
        assert mailing.stands()[0] == "held"
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sending.connections, "send", held_meanwhile)
        with pytest.raises(SettleRefused):
            mailing.send(job)
    assert (mailing.stands()[0], receiver.count) == ("sent", 1)


@pytest.mark.parametrize(
    ("verb", "stage", "state"),
    [(b"RCPT", "rcpt", "deferred"), (b"DATA", "data", "deferred"), (b".", "", "sending")],
)
def test_a_timeout_in_the_conversation_leaves_no_doubt_where_there_is_none(
    mailing: Mailing, verb: bytes, stage: str, state: str
) -> None:
    """Before the end of the mail was sent the delivery is deferred and the next run sends it; after it, held."""
    with interrupted(JobTimeout("too long")) as interrupt:

        def says(line: bytes) -> bytes:
            if line[:4] != verb:
                return b"yes"
            interrupt()
            return b""

        with Lines(says).running() as (_, port):
            mailing.use(SMTP_PORT=str(port))
            job = a_job(mailing.port)
            with pytest.raises(JobTimeout):
                mailing.send(job)
    why = f"interrupted at {stage} by JobTimeout: too long" if stage else None
    assert mailing.stands() == (state, why)
    with receiving(Receiver()) as receiver:
        mailing.use(SMTP_PORT=str(receiver.port))
        mailing.send(mailing.again(job))
        sending.connections.close()
    assert (mailing.stands()[0], receiver.count) == (("held", 0) if state == "sending" else ("sent", 1))


def test_a_timeout_after_the_yes_does_not_forget_it(
    mailing: Mailing, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It strikes between the server's answer and the settle: sent is written down, and the next run has nothing to do."""
    accept, job = sending.connections.send, a_job(mailing.port)

    def strike(*arguments: Any) -> Any:
        accept(*arguments)
        raise JobTimeout

    monkeypatch.setattr(sending.connections, "send", strike)
    with pytest.raises(JobTimeout):
        mailing.send(job)
    assert mailing.stands() == ("sent", None)
    assert mailing.send(mailing.again(job)) == {"skipped": f"delivery {DELIVERY} is sent already"}
    assert receiver.count == 1


@pytest.mark.parametrize(("policy", "state"), [("hold", "held"), ("resend", "deferred")])
def test_an_answer_that_is_lost(mailing: Mailing, policy: str, state: str) -> None:
    """The connection breaks after the whole mail was sent: held at once, or tried again under `resend`; held in the end."""

    def converse(connection: Any) -> None:
        speak(connection, b"220 mx", b"250 ok", b"250 ok", b"250 ok", b"354 go")
        connection.recv(65536)

    with raw_server(converse) as (_, port):
        mailing.use(SMTP_PORT=str(port), AMBIGUOUS=policy)
        job = a_job(mailing.port)
        with pytest.raises(Retry) if policy == "resend" else contextlib.nullcontext():
            mailing.send(job)
        assert mailing.stands()[0] == state
        if policy == "resend":
            mailing.send(mailing.again(job, max_attempts=2))
    assert mailing.stands()[0] == "held"
    assert "after the whole mail was sent" in mailing.port.ends[0]


@pytest.mark.parametrize("said", ["452 4.2.2 mailbox full", "554 4.7.1 greylisted"])
def test_the_last_later_is_a_bounce_unless_it_is_not_about_the_mail(mailing: Mailing, said: str) -> None:
    """A mailbox that stays full bounces with a job in bounce:process; a server that is away, or a wrong password, leaves
    the mail deferred.
    """
    last = a_job(mailing.port, max_attempts=1)
    mailing.use(SMTP_PORT="1")
    with pytest.raises(Retry):
        mailing.send(last)
    assert mailing.stands()[0] == "deferred"
    with serving(Scripted(rcpt=["530 log in first", said])) as server:
        mailing.use(SMTP_PORT=str(server.port))
        with pytest.raises(Retry):
            mailing.send(a_job(mailing.port, id=last.id, max_attempts=1))
        assert mailing.stands()[0] == "deferred"
        mailing.send(a_job(mailing.port, id=last.id, max_attempts=1))
        sending.connections.close()
    assert mailing.stands() == ("bounced", f"deferred at rcpt: {said}; attempt 1 was the last")
    query = "select payload ->> 'status' from pmqd.jobs where queue_name = 'bounce:process'"
    assert mailing.conn.execute(query).fetchall() == [(said.split()[1],)]


def test_a_suppressed_recipient_is_skipped(mailing: Mailing, receiver: Receiver) -> None:
    """In a campaign no job is made for him; one whose job exists already is skipped when it runs, in whatever case."""
    with psycopg.connect(mailing.dsn) as conn:
        assert deliveries.suppress(conn, "Gone@Example.com", Suppression.HARD_BOUNCE, "test")
        assert not deliveries.suppress(conn, "gone@example.com", Suppression.MANUAL)
        campaign = start_campaign(conn, _people("a@example.com", "GONE@example.com"), template="welcome")
        deliveries.suppress(conn, "zoe@example.com", Suppression.COMPLAINT)
    mailing.send()
    assert (mailing.stands(), receiver.count) == (("skipped", "suppressed: complaint"), 0)
    assert mailing.port.ends == [{"skipped": "suppressed: complaint"}]
    with psycopg.connect(mailing.dsn) as conn:
        report = read_report(conn, campaign)
        jobs = conn.execute("select payload ->> 'email' from pmqd.jobs").fetchall()
    assert report is not None
    assert (report.deliveries[State.QUEUED], report.deliveries[State.SKIPPED], report.state) == (
        1,
        1,
        "sending",
    )
    assert jobs == [("a@example.com",)]


def test_campaign_process_makes_everything_once(mailing: Mailing) -> None:
    """One job, asked for twice; run again, or with recipients added, it makes what is missing; a wrong list nothing at all."""
    with psycopg.connect(mailing.dsn) as conn:
        campaign = create_campaign(conn, _people(*_addresses(2500)), template="welcome", priority=200)
        assert request_campaign(conn, campaign) == request_campaign(conn, campaign)
        report = read_report(conn, campaign)
    assert report is not None
    assert (report.state, report.total) == ("created", 0)
    for _ in range(2):
        process_campaign(job=a_job(mailing.port), campaign_id=campaign)
    with psycopg.connect(mailing.dsn) as conn:
        create_campaign(conn, _people(*_addresses(2501)), template="welcome", campaign_id=campaign)
    process_campaign(job=a_job(mailing.port), campaign_id=campaign)
    query = (
        "select count(*), count(distinct d.id), bool_and(j.priority = 200) from penguinmails.deliveries d"
        " join pmqd.jobs j on j.id = d.job_id and j.payload ->> 'email' = d.email"
    )
    assert mailing.conn.execute(query).fetchone() == (2501, 2501, True)
    assert mailing.conn.execute("select count(*) from pmqd.jobs").fetchone() == (2502,)

    wrong = uuid4()
    mailing.conn.execute("insert into penguinmails.campaigns (id, template) values (%s, 'welcome')", [wrong])
    mailing.conn.execute(
        "insert into penguinmails.recipients (campaign_id, email, variables) values (%s, 'x@example.com', '{\"n\": {}}')",
        [wrong],
    )
    for bad in (wrong, uuid4()):
        with pytest.raises(Discard):
            process_campaign(job=a_job(mailing.port), campaign_id=bad)
    assert mailing.conn.execute("select count(*) from penguinmails.deliveries").fetchone() == (2501,)


def test_sums_equal_the_rows_whatever_happens_at_once(mailing: Mailing) -> None:
    """Eight sessions change 400 deliveries of two campaigns: singly, together, undone; and rows are deleted."""
    with psycopg.connect(mailing.dsn) as conn:
        for campaign in (CAMPAIGN, uuid4()):
            start_campaign(
                conn, _people(*_addresses(200)), template="welcome", campaign_id=campaign, priority=1
            )
    rows = mailing.conn.execute("select id, campaign_id, recipient_id, job_id from penguinmails.deliveries")
    targets = [Attempt(own, campaign, to, "", job, uuid4(), "w") for own, campaign, to, job in rows]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        with psycopg.connect(mailing.dsn) as conn:
            for attempt in chance.sample(targets[8:], 60):
                with contextlib.suppress(ZeroDivisionError), conn.transaction():
                    if deliveries.begin(conn, attempt, resend=False) is None and chance.random() < 0.7:
                        state = chance.choice((State.SENT, State.DEFERRED, State.BOUNCED, State.HELD))
                        deliveries.end(conn, attempt, Result(state, 250, None, ""))
                    if chance.random() < 0.3:
                        raise ZeroDivisionError
            conn.execute("delete from penguinmails.deliveries where id = %s", [targets[seed].id])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    sums, counts = counted(mailing.conn)
    assert sums == counts
    assert sum(sums.values()) == 392
    assert len(sums) >= 5
    mailing.conn.execute("update penguinmails.deliveries set state = 'queued' where state <> 'queued'")
    assert counted(mailing.conn) == ({"queued": 392}, {"queued": 392})
    with pytest.raises(psycopg.errors.RaiseException, match="is not counted"):
        mailing.conn.execute("truncate penguinmails.deliveries")


def test_the_commands(mailing: Mailing, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`campaign start`, `report`, `held`, `held drop`, `schema`: what they say, and exit codes of what cannot be."""
    (tmp_path / "people.csv").write_text("email\na@example.com\nb@example.com\n")
    start = ["campaign", "start", str(tmp_path / "people.csv"), "-t", "welcome", "--id", str(CAMPAIGN)]
    assert cli.main([*start, "--dry-run"]) == 0
    assert [cli.main(start), cli.main(start)] == [0, 0]
    assert "2 recipients, 0 repeated lines left out; job" in capsys.readouterr().out
    assert mailing.conn.execute("select count(*) from penguinmails.recipients").fetchone() == (2,)
    mailing.send(mailing.cut())
    assert cli.main(["report", str(CAMPAIGN)]) == 0
    told = capsys.readouterr().out
    assert f"campaign {CAMPAIGN}: created, 1 deliveries" in told
    assert ["held", "1"] in [line.split() for line in told.splitlines()]
    assert cli.main(["held"]) == 0
    told = capsys.readouterr().out
    assert str(DELIVERY) in told
    assert told.endswith("1 held\n")
    assert cli.main(["held", "drop"]) == 2
    assert cli.main(["held", "drop", "--campaign", str(CAMPAIGN)]) == 0
    assert cli.main(["held", "release", str(DELIVERY)]) == 1
    assert cli.main(["report", str(uuid4())]) == 1
    assert "is not held" in capsys.readouterr().err
    assert [cli.main(["schema", "apply"]), cli.main(["schema", "check"])] == [0, 0]
    mailing.conn.execute("drop index penguinmails.deliveries_email")
    assert cli.main(["schema", "check"]) == 79
    assert "index deliveries_email is missing" in capsys.readouterr().err


def test_each_role_can_do_its_part_and_no_more(mailing: Mailing, receiver: Receiver) -> None:
    """A producer starts a campaign and sees no address; the daemon makes it and sends; a person decides about the held."""
    logins = {role: f"mail_{role}_{uuid4().hex[:8]}" for role in ("enqueue", "daemon", "admin")}
    for role, login in logins.items():
        mailing.conn.execute(f"create role {login} login in role pmqd_{role}, penguinmails_{role}".encode())

    def dsn(role: str) -> str:
        return psycopg.conninfo.make_conninfo(mailing.dsn, user=logins[role])

    try:
        with psycopg.connect(dsn("enqueue")) as conn:
            for _ in range(2):
                campaign = create_campaign(
                    conn, _people("a@example.com"), template="welcome", campaign_id=CAMPAIGN
                )
            request_campaign(conn, campaign)
            assert read_report(conn, campaign) is not None
            for table in ("recipients", "deliveries", "suppressions"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege), conn.transaction():
                    conn.execute(f"select * from penguinmails.{table}".encode())
        port = Port(dsn("daemon"))
        process_campaign(job=a_job(port), campaign_id=campaign)
        mailing.send(a_job(port))
        assert (mailing.stands()[0], receiver.count) == ("sent", 1)
        mailing.conn.execute("update penguinmails.deliveries set state = 'held' where state = 'queued'")
        with psycopg.connect(dsn("admin")) as conn:
            assert held.release(conn, [each.id for each in held.read_held(conn)]) == 1
    finally:
        for login in logins.values():
            mailing.conn.execute(f"drop role {login}".encode())


def test_without_the_schema_no_mail_uses_up_its_attempts(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first mail of a worker looks: it is put off, uncharged, and the command says what to run."""
    monkeypatch.setattr(schema, "_seen", set())
    with pytest.raises(Snooze):
        send_campaign_mail(job=a_job(Port(database)), **ARGUMENTS)
    with pytest.raises(SchemaError, match="run `penguinmails schema apply`"):
        schema.check(database)


def _insert_job(mailing: Mailing, job_id: UUID, payload: str) -> None:
    query = "insert into pmqd.jobs (id, queue_name, kind, payload) values (%s, 'email-sending', 'send_campaign_mail', %s)"
    mailing.conn.execute(query, [job_id, payload])


def _people(*addresses: str) -> Recipients:
    return Recipients([Recipient(address, "", {}) for address in addresses], 0)


def _addresses(number: int) -> list[str]:
    return [f"p{each}@example.com" for each in range(number)]
