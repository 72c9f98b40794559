"""Warming an account up against a real database and SMTP server: plans, letters, notes, decisions, commands."""

import inspect
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4

import orjson
import psycopg
import pytest
from psycopg.rows import dict_row

from penguinmails import cli, ramps, sending, warmup
from penguinmails.campaign import Recipient, Recipients, start_campaign
from penguinmails.demo.receiver import Receiver, receiving
from penguinmails.queues import WARMUP
from penguinmails.settings import mail_settings
from pmqd import Discard, Snooze
from tests.mail_jobs import Port, a_job, counted

SEEDS = ("a@seeds.example", "b@seeds.example", "c@seeds.example")
TASKS = {
    each.name: each
    for each in (warmup.plan_warmup, warmup.send_warmup_letter, warmup.note_letter, warmup.engage)
}


class Account:
    """The account `default` in a database, and a worker of warmup:process that runs what is told."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn
        self.conn = psycopg.connect(dsn, autocommit=True, row_factory=dict_row)

    def start(self, **changes: Any) -> ramps.Warming:
        """As `warmup start` does it."""
        with psycopg.connect(self.dsn) as conn:
            warming = ramps.start(conn, mail_settings(), "default", **changes)
            warmup.request_plan(conn, warming)
        return warming

    def run(self, kind: str, job: Any = None, **arguments: Any) -> Any:
        """Runs a task."""
        job = job or a_job(Port(self.dsn), queue_name=WARMUP, kind=kind, run_at=datetime.now(UTC).timestamp())
        return TASKS[kind](job=job, **arguments)

    def plan(self, warming: ramps.Warming, day: date | None = None) -> None:
        """Runs the plan of a day; None: today."""
        self.run("warmup.plan", account="default", day=day or warming.today, generation=warming.generation)

    def jobs(self, kind: str) -> list[dict[str, Any]]:
        """The queued jobs of a kind."""
        query = "select * from pmqd.jobs where kind = %s order by run_at, id"
        return self.conn.execute(query, [kind]).fetchall()

    def work(self, kind: str) -> None:
        """Runs all jobs of a kind as they lie there, as if it were their time."""
        for row in self.jobs(kind):
            claim = {
                "id": row["id"],
                "queue_name": WARMUP,
                "kind": kind,
                "payload": orjson.dumps(row["payload"]),
            }
            job = a_job(Port(self.dsn), **claim, run_at=datetime.now(UTC).timestamp())
            claimed = job._claimed
            args, named = TASKS[kind].bind(claimed, job.worker_id, job._port)
            TASKS[kind].function(*args, **named)

    def passes(self, day: date, *, bounced: int = 0, complained: int = 0) -> None:
        """What was started today was started on that day, and all of it is sent but these."""
        when = datetime.combine(day, datetime.min.time(), UTC) + timedelta(hours=12)
        moved = "update penguinmails.campaigns set started_at = %s where abs(extract(epoch from now() - started_at)) < 60 returning id"
        ids = [row["id"] for row in self.conn.execute(moved, [when]).fetchall()]
        ends = ["bounced"] * bounced + ["complained"] * complained
        query = "select id from penguinmails.deliveries where campaign_id = any(%s) order by id"
        for number, row in enumerate(self.conn.execute(query, [ids]).fetchall()):
            state = ends[number] if number < len(ends) else "sent"
            self.conn.execute(
                "update penguinmails.deliveries set state = %s where id = %s", [state, row["id"]]
            )

    def standing(self) -> ramps.Standing:
        """As `warmup status` has it."""
        with psycopg.connect(self.dsn) as conn:
            (found,) = ramps.standings(conn)
        return found

    def one(self, query: str) -> Any:
        """The first row's values."""
        with psycopg.connect(self.dsn) as conn:
            return conn.execute(query.encode()).fetchone()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A server that says yes to every mail."""
    with receiving(Receiver()) as receiver:
        yield receiver
        sending.connections.close()


@pytest.fixture
def account(mail_database: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    """Working hours all day long, so that the tests do not depend on the time of day."""
    for name, value in {
        "PMQD_POSTGRES__DSN": mail_database,
        "PENGUINMAILS_SMTP_PORT": str(receiver.port),
        "PENGUINMAILS_HELO_NAME": "test.local",
        "PENGUINMAILS_FROM_ADDRESS": "new@example.org",
        "PENGUINMAILS_WARMUP_SEEDS": orjson.dumps(SEEDS).decode(),
        "PENGUINMAILS_WARMUP_FROM_HOUR": "0",
        "PENGUINMAILS_WARMUP_TO_HOUR": "24",
    }.items():
        monkeypatch.setenv(name, value)
    mail_settings.cache_clear()
    made = Account(mail_database)
    yield made
    with psycopg.connect(mail_database) as conn:
        sums, rows = counted(conn)
    assert sums == rows
    made.conn.close()
    mail_settings.cache_clear()


def tomorrow(warming: ramps.Warming) -> date:
    """A whole day is planned, whatever time it is."""
    return warming.today + timedelta(days=1)


def test_a_plan_that_runs_again_plans_nothing_twice(account: Account, receiver: Receiver) -> None:
    """The day's letters, spread over its hours, with their deliveries, and one plan of the next day; again: nothing more. A plan of
    an earlier start does nothing at all. Each letter is sent once, to the seeds in turn.
    """
    old = account.start(first=12, growth=1.5, ceiling=100)
    warming = account.start()
    account.plan(old, tomorrow(old))
    assert account.jobs("warmup.outbound") == []
    for _ in range(2):
        account.plan(warming, tomorrow(warming))
    letters = account.jobs("warmup.outbound")
    begin, end = warming.hours.window(tomorrow(warming))
    assert len(letters) == 12
    assert all(begin <= each["run_at"] <= end for each in letters)
    assert max(b["run_at"] - a["run_at"] for a, b in pairwise(letters)) < timedelta(hours=4)
    plans = {each["payload"]["day"]: each["run_at"] for each in account.jobs("warmup.plan")}
    assert plans[str(tomorrow(warming) + timedelta(days=1))] == end
    assert account.one(
        "select count(*), count(distinct job_id), min(state) from penguinmails.deliveries"
    ) == (
        12,
        12,
        "queued",
    )
    account.work("warmup.outbound")
    account.work("warmup.outbound")
    assert dict(receiver.accepted) == dict.fromkeys(SEEDS, 4)
    assert set(receiver.message_ids.values()) == {1}


def test_a_good_day_raises_and_a_bad_one_lowers(account: Account) -> None:
    """Yesterday's bounces and complaints move the ramp, those of the account's campaigns with them; the reason is kept. A day on which
    nothing went out raises nothing.
    """
    warming = account.start(first=20, growth=1.5, ceiling=45)
    day = tomorrow(warming)
    account.plan(warming, day)
    steps = [
        ({}, 30, "ramping", "raise", "bounce rate 0.00%, complaint rate 0.00%"),
        ({}, 45, "finished", "raise", "bounce rate 0.00%, complaint rate 0.00%"),
        ({"bounced": 3}, 45, "holding", "hold", "bounce rate 6.67%, held from 5.00%"),
        ({"bounced": 5}, 22, "holding", "lower", "bounce rate 11.11%, lowered from 10.00%"),
        ({"complained": 1}, 20, "holding", "lower", "complaint rate 4.55%, lowered from 0.30%"),
    ]
    for ends, volume, state, decision, reason in steps:
        account.passes(day, **ends)
        day += timedelta(days=1)
        account.plan(warming, day)
        stands = account.standing()
        assert (stands.volume, stands.state, stands.decision, stands.reason) == (
            volume,
            state,
            decision,
            reason,
        )
        assert (stands.day, stands.planned) == (day, volume)
    assert account.one(
        "select planned, sent, bounced, complained from penguinmails.warmup_days where decision = 'hold'"
    ) == (45, 42, 3, 0)

    people = Recipients([Recipient(f"p{each}@example.com", "", {}) for each in range(2000)], 0)
    with psycopg.connect(account.dsn) as conn:
        start_campaign(conn, people, template="welcome")
        conn.execute("update penguinmails.campaigns set started_at = now() where name = ''")
    account.passes(day, complained=3)  # of 2,020, of which none is a letter's share alone
    account.plan(warming, day + timedelta(days=1))
    assert account.standing().reason == "complaint rate 0.15%, held from 0.10%"
    account.plan(warming, day + timedelta(days=2))
    assert account.standing().reason == "0 sent of 20 planned: too few to tell"


def test_stop_skips_what_has_not_gone_out_and_start_goes_on(account: Account, receiver: Receiver) -> None:
    """The letters' jobs find them skipped, the next plan finds nothing to do; a letter that is hours late is left out too."""
    account.start(first=48, ceiling=60)
    warming = account.start()
    account.plan(warming)
    count = len(account.jobs("warmup.outbound"))
    late, *_ = account.jobs("warmup.outbound")
    arguments = {name: UUID(late["payload"][name]) for name in ("campaign_id", "recipient_id")}
    hours_ago = (datetime.now(UTC) - timedelta(hours=3)).timestamp()
    job = a_job(Port(account.dsn), id=late["id"], queue_name=WARMUP, run_at=hours_ago)
    told = account.run(
        "warmup.outbound", job, **arguments, email=SEEDS[0], name="", template="warmup", account="default"
    )
    assert told == {"skipped": "late by 3.0 hours"}
    with psycopg.connect(account.dsn) as conn:
        assert ramps.stop(conn, "default") == count - 1
        with pytest.raises(ramps.WarmupError, match="account 'ses' has no ramp"):
            ramps.stop(conn, "ses")
    account.work("warmup.outbound")
    account.plan(warming, tomorrow(warming))
    assert (receiver.count, len(account.jobs("warmup.outbound"))) == (0, count)
    again = account.start(growth=2.0)
    assert (again.volume, again.ramp.growth, again.state) == (48, 2.0, "ramping")
    account.plan(again, tomorrow(again))
    assert len(account.jobs("warmup.outbound")) == count + 48


def test_a_letter_of_a_seed_is_noted_and_answered_once(account: Account, receiver: Receiver) -> None:
    """Told twice, it is noted once and answered once, as an answer; an answer to our letter is engagement and is not answered;
    what a seed did with our letter is noted once; strangers are refused.
    """
    warming = account.start(first=6)
    account.plan(warming, tomorrow(warming))
    letter = f"<{account.jobs('warmup.outbound')[0]['payload']['recipient_id']}@example.org>"
    query = "select id from penguinmails.deliveries limit 1"
    own = f"<{account.one(query)[0]}@example.org>"
    came = {
        "account": "default",
        "message_id": "<1@seeds.example>",
        "sender": "A@seeds.example",
        "subject": "Hé",
    }
    for _ in range(2):
        account.run("warmup.inbound", **came)
    account.run("warmup.inbound", **{**came, "message_id": "<2@seeds.example>"}, in_reply_to=[letter, own])
    assert [each["payload"]["message_id"] for each in account.jobs("warmup.engagement")] == [
        "<1@seeds.example>"
    ]
    for action in ("opened", "opened", "moved"):
        account.run("warmup.engagement", account="default", message_id=own, action=action)
    for _ in range(2):
        account.work("warmup.engagement")
    reply = {"account": "default", "sender": SEEDS[0]}
    for arguments in (
        {**reply, "message_id": "<x@example.com>", "action": "opened"},
        {**reply, "message_id": "not one", "action": "reply"},
        {**reply, "message_id": "<3@seeds.example>", "action": "reply", "sender": "evil@example.com"},
        {**reply, "message_id": "<3@seeds.example>", "action": "reply", "account": "ses"},
    ):
        with pytest.raises(Discard):
            account.run("warmup.engagement", **arguments)
    account.conn.execute(
        "delete from pmqd.jobs where kind = 'warmup.outbound' and payload ->> 'in_reply_to' = ''"
    )
    account.work("warmup.outbound")
    assert dict(receiver.accepted) == {"A@seeds.example": 1}
    assert receiver.subjects["A@seeds.example"] == "Re: Hé"
    stands = account.one(
        "select count(*) filter (where step = 'received'), count(*) from penguinmails.warmup_notes"
    )
    assert stands == (2, 6)  # received twice, answered once; replied, opened and moved once


def test_settings_that_cannot_warm_up_charge_nothing(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker without seed mailboxes, or without the account, puts the plan off; the command refuses."""
    warming = account.start()
    monkeypatch.setenv("PENGUINMAILS_WARMUP_SEEDS", "[]")
    mail_settings.cache_clear()
    with pytest.raises(Snooze):
        account.plan(warming)
    for name, message in (("default", "WARMUP_SEEDS is empty"), ("ses", "there is no account 'ses'")):
        with psycopg.connect(account.dsn) as conn, pytest.raises(ramps.WarmupError, match=message):
            ramps.start(conn, mail_settings(), name)


def test_the_commands(account: Account, capsys: pytest.CaptureFixture[str]) -> None:
    """`warmup start`, `status`, `stop`: what they say, and what they refuse."""
    assert cli.main(["warmup", "start", "default", "--from", "30", "--growth", "1.3", "--ceiling", "90"]) == 0
    assert "default: 30 letters a day, times 1.3 a day, at most 90; " in capsys.readouterr().out
    assert len(account.jobs("warmup.plan")) == 1
    account.work("warmup.plan")
    assert cli.main(["warmup", "start", "default", "--ceiling", "10"]) == 1
    assert "ceiling is 10, allowed: start (30) to 100000" in capsys.readouterr().err
    assert cli.main(["warmup", "start", "nosuch"]) == 1
    assert "PENGUINMAILS_ACCOUNTS allows: default" in capsys.readouterr().err
    assert cli.main(["warmup", "status", "--json"]) == 0
    (told,) = orjson.loads(capsys.readouterr().out)
    assert (told["account"], told["state"], told["volume"], told["decision"]) == (
        "default",
        "ramping",
        30,
        None,
    )
    assert told["day"] == str(datetime.now(UTC).date())
    assert cli.main(["warmup", "stop", "default"]) == 0
    assert f"default: stopped, {told['planned']} letters skipped" in capsys.readouterr().out
    assert cli.main(["warmup", "status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:5] == ["account", "state", "day", "planned", "sent"]
    assert lines[1].split()[:4] == ["default", "paused", told["day"], str(told["planned"])]
    assert lines[-1] == "1 accounts"


def test_each_role_can_do_its_part(account: Account) -> None:
    """A person starts and stops a ramp and looks at it; the daemon plans, sends and notes."""
    logins = {role: f"warm_{role}_{uuid4().hex[:8]}" for role in ("daemon", "admin")}
    for role, login in logins.items():
        account.conn.execute(f"create role {login} login in role pmqd_{role}, penguinmails_{role}".encode())
    try:
        owner = account.dsn
        account.dsn = psycopg.conninfo.make_conninfo(owner, user=logins["admin"])
        warming = account.start(first=2)
        account.dsn = psycopg.conninfo.make_conninfo(owner, user=logins["daemon"])
        account.plan(warming, tomorrow(warming))
        account.plan(warming, tomorrow(warming) + timedelta(days=1))
        account.work("warmup.outbound")
        account.run("warmup.inbound", account="default", message_id="<1@x.example>", sender=SEEDS[1])
        account.work("warmup.engagement")
        account.dsn = psycopg.conninfo.make_conninfo(owner, user=logins["admin"])
        assert account.standing().volume == 2
        with psycopg.connect(account.dsn) as conn:
            assert ramps.stop(conn, "default") == 1  # the answer, which has not gone out
    finally:
        for login in logins.values():
            account.conn.execute(f"drop role {login}".encode())


def test_a_held_letter_can_be_released() -> None:
    """`held release` sends it as a mail of email-sending: so the arguments are the same."""
    letter, mail = (
        inspect.signature(each.function).parameters
        for each in (warmup.send_warmup_letter, sending.send_campaign_mail)
    )
    assert letter == mail
