"""Workers that are killed at each step of a mail, and in the middle of making a campaign, under a real daemon."""

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4, uuid5

import orjson
import psycopg
import pytest
from aiosmtpd.smtp import SMTP, Envelope, Session

from penguinmails import ramps
from penguinmails.campaign import Recipient, Recipients, create_campaign, request_campaign, start_campaign
from penguinmails.message import delivery_id
from penguinmails.proof import Plan, faults, prove
from penguinmails.sending import send_campaign_mail
from penguinmails.settings import MailSettings
from penguinmails.warmup import request_plan
from tests.fix_daemon import Daemon, MakeDaemon
from tests.fix_servers import WaitUntil
from tests.mail_jobs import counted
from tests.process.test_penguinmails_daemon import SHIPPED
from tests.smtp_servers import serving

WAITS = (
    "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and application_name like 'pmqd:%'"
)


class Gate:
    """An SMTP handler that stops a conversation at one of its steps until it is let on; what it took counts as taken."""

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        self.stop_at: str | None = None
        self.reached, self.go_on = threading.Event(), threading.Event()

    def stop(self, step: str) -> None:
        """The next conversation stops there."""
        self.reached.clear()
        self.go_on.clear()
        self.stop_at = step

    async def handle_MAIL(  # noqa: N802 - aiosmtpd's names
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """The intent is committed by now, and nothing of the mail is here."""
        await self._pass("mail")
        envelope.mail_from = address
        return "250 ok"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        """The mail is taken; the yes is said afterwards."""
        self.taken[envelope.rcpt_tos[0]] += 1
        await self._pass("yes")
        return "250 2.0.0 taken"

    async def _pass(self, step: str) -> None:
        if self.stop_at == step:
            self.stop_at = None
            self.reached.set()
            await asyncio.to_thread(self.go_on.wait, 30)


@pytest.fixture
def database(mail_database: str) -> str:
    """The database of the daemon and of `connection`."""
    return mail_database


@dataclass
class Rig:
    """A daemon with one worker, and what a test does to it."""

    dsn: str
    connection: psycopg.Connection[Any]
    family: Daemon
    wait_until: WaitUntil

    def send(self, email: str) -> str:
        """A campaign of one."""
        with psycopg.connect(self.dsn) as conn:
            start_campaign(conn, Recipients([Recipient(email, "", {})], 0), template="welcome")
        return email

    def send_locked(self, email: str) -> None:
        """A mail whose delivery is there and cannot be written: the worker waits with its intent, and is killed."""
        job, campaign, recipient = uuid4(), uuid4(), uuid4()
        insert = "insert into penguinmails.deliveries (id, campaign_id, recipient_id, email, job_id) values (%s, %s, %s, %s, %s)"
        self.connection.execute(insert, [delivery_id(campaign, recipient), campaign, recipient, email, job])
        mail = {
            "campaign_id": campaign,
            "recipient_id": recipient,
            "email": email,
            "name": "",
            "template": "welcome",
        }
        with self.locked(email):
            options: dict[str, Any] = {"conn": self.connection, "id": job, **mail}
            send_campaign_mail.enqueue(**options)
            self.kill_blocked()

    @contextlib.contextmanager
    def locked(self, email: str) -> Iterator[None]:
        """Nobody can write the recipient's delivery meanwhile."""
        with psycopg.connect(self.dsn) as conn:
            conn.execute("select from penguinmails.deliveries where email = %s for update", [email])
            yield
            conn.rollback()

    def kill(self) -> None:
        """SIGKILL to the worker."""
        (worker,) = self.family.children("worker")
        worker.kill()
        worker.wait(10)

    def kill_blocked(self) -> None:
        """SIGKILL to the worker once it waits for a lock."""
        self.wait_until(lambda: self.connection.execute(WAITS).fetchone() == (1,), 15, "a worker that waits")
        self.kill()

    def is_now(self, email: str, state: str) -> None:
        """Waits until the recipient's delivery is in this state."""
        query = "select state from penguinmails.deliveries where email = %s"
        self.wait_until(
            lambda: self.connection.execute(query, [email]).fetchone() == (state,), 20, f"{email} {state}"
        )


@pytest.mark.timeout(90)
def test_a_worker_killed_at_each_step_of_a_mail(
    database: str, connection: psycopg.Connection[Any], daemon: MakeDaemon, wait_until: WaitUntil
) -> None:
    """Before the intent is committed the mail is sent once by the next run; between intent and settle it is held, whether the
    server has taken it or not, and no other run sends it; after the settle it is sent and stays so.
    """
    gate = Gate()
    with serving(gate) as server:
        pool = SHIPPED["workers"][0] | {"processes": 1}
        environ = {"PENGUINMAILS_SMTP_PORT": str(server.port), "PENGUINMAILS_HELO_NAME": "test.local"}
        family = daemon({**SHIPPED, "workers": [pool]}, environ=environ)
        rig = Rig(database, connection, family, wait_until)

        rig.send_locked("intent@example.com")
        rig.is_now("intent@example.com", "sent")

        for step in ("mail", "yes"):
            gate.stop(step)
            email = rig.send(f"{step}@example.com")
            assert gate.reached.wait(15)
            rig.is_now(email, "sending")
            rig.kill()
            gate.go_on.set()
            rig.is_now(email, "held")

        gate.stop("yes")
        email = rig.send("settle@example.com")
        assert gate.reached.wait(15)
        with rig.locked(email):
            gate.go_on.set()
            rig.kill_blocked()
        rig.is_now(email, "held")

        email = rig.send("after@example.com")
        rig.is_now(email, "sent")
        rig.kill()
        wait_until(lambda: family.children("worker"), 10, "the next worker")
    assert gate.taken == {f"{step}@example.com": 1 for step in ("intent", "yes", "settle", "after")}
    assert counted(connection) == ({"sent": 2, "held": 3}, {"sent": 2, "held": 3})
    ends = connection.execute("select status, count(*) from pmqd.jobs group by 1 order by 1").fetchall()
    assert ends == [("completed", 2), ("failed", 3)]


@pytest.mark.timeout(60)
def test_a_worker_killed_while_it_makes_a_campaign(
    database: str, connection: psycopg.Connection[Any], daemon: MakeDaemon, wait_until: WaitUntil
) -> None:
    """Killed after thousands of rows, before its commit: nothing is there; its job runs again and makes each of them once."""
    people = [Recipient(f"p{number}@example.com", "", {}) for number in range(5000)]
    pool = SHIPPED["workers"][1]
    assert pool["queues"] == ["campaign:process"]
    rig = Rig(database, connection, daemon({**SHIPPED, "workers": [pool]}), wait_until)
    with psycopg.connect(database) as conn:
        campaign = create_campaign(conn, Recipients(people, 0), template="welcome")
        conn.commit()
        # A row of the campaign in an open transaction: whoever comes to it waits.
        row = conn.execute("select recipient_id from penguinmails.recipients offset 4000 limit 1").fetchone()
        assert row is not None
        insert = "insert into penguinmails.deliveries (id, campaign_id, recipient_id, email) values (%s, %s, %s, '')"
        conn.execute(insert, [delivery_id(campaign, row[0]), campaign, row[0]])
        job = request_campaign(connection, campaign)
        rig.kill_blocked()
        assert connection.execute("select count(*) from penguinmails.deliveries").fetchone() == (0,)
        conn.rollback()
    query = "select status from pmqd.jobs where id = %s"
    wait_until(lambda: connection.execute(query, [job]).fetchone() == ("completed",), 20, "the campaign")
    made = connection.execute(
        "select count(*), count(distinct (d.recipient_id, j.id)) from penguinmails.deliveries d join pmqd.jobs j on j.id = d.job_id"
    ).fetchone()
    assert made == (5000, 5000)
    assert connection.execute("select count(*) from pmqd.jobs").fetchone() == (5001,)
    assert counted(connection) == ({"queued": 5000}, {"queued": 5000})


@pytest.mark.timeout(60)
def test_a_worker_killed_while_it_plans_a_day(
    database: str, connection: psycopg.Connection[Any], daemon: MakeDaemon, wait_until: WaitUntil
) -> None:
    """Killed with hundreds of letters enqueued, before its commit: no letter, no day, no next plan; its job runs again and makes each once."""
    [pool] = [pool for pool in SHIPPED["workers"] if pool["name"] == "warmup"]
    assert pool["queues"] == ["warmup:process"]
    settings = MailSettings(
        warmup_seeds=("a@seeds.example", "b@seeds.example"), warmup_from_hour=0, warmup_to_hour=24
    )
    environ = {"PENGUINMAILS_WARMUP_SEEDS": orjson.dumps(settings.warmup_seeds).decode()}
    rig = Rig(database, connection, daemon({**SHIPPED, "workers": [pool]}, environ=environ), wait_until)
    made = "select count(*), count(distinct job_id) from penguinmails.deliveries"
    jobs = "select kind, count(*) from pmqd.jobs group by kind order by kind"
    with psycopg.connect(database) as conn, psycopg.connect(database, autocommit=True) as other:
        warming = ramps.start(other, settings, "default", first=2_000, ceiling=2_000)
        campaign = ramps.letters_id("default", warming.today)
        recipient = uuid5(campaign, "1")
        # A delivery of the day in an open transaction: whoever comes to it waits.
        insert = "insert into penguinmails.deliveries (id, campaign_id, recipient_id, email) values (%s, %s, %s, '')"
        conn.execute(insert, [delivery_id(campaign, recipient), campaign, recipient])
        _, at = request_plan(other, warming)
        assert at == warming.now
        rig.kill_blocked()
        assert connection.execute(made).fetchone() == (0, 0)
        assert connection.execute(jobs).fetchall() == [("warmup.plan", 1)]
        conn.rollback()
    query = "select planned from penguinmails.warmup_days"
    wait_until(lambda: connection.execute(query).fetchall(), 20, "the day's plan")
    ((planned,),) = connection.execute(query).fetchall()
    assert 0 < planned <= 2_000
    assert connection.execute(made).fetchone() == (planned, planned)
    assert connection.execute(jobs).fetchall() == [("warmup.outbound", planned), ("warmup.plan", 2)]


@pytest.mark.timeout(90)
def test_the_proof_in_small(short_folder: Path) -> None:
    """200 mails and a kill four times a second: nobody got two, and held are exactly those who were cut."""
    plan = Plan(mails=200, workers=3, kill_seconds=0.25, seed=7)
    outcome, receiver = prove(plan, short_folder)
    assert faults(plan, outcome, receiver) == []
    assert outcome.kills >= 3
