"""Whoever writes to Redis makes nothing run that PostgreSQL does not allow: forged entries before a real worker."""

import json
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pmqd import App, Job
from pmqd.broker import Broker
from pmqd.hints import hinted_id
from pmqd.settings import RedisSettings
from tests.fix_servers import wait_until
from tests.worker_family import Bank, Family, family, open_bank

app = App()


@app.task(queue="q", name="honest")
def honest(job: Job, text: str = "") -> str:
    """Says what it was given."""
    return text or "nothing"


@pytest.fixture
def bank(database: str, redis_url: str) -> Iterator[Bank]:
    """The test's look at the stores."""
    with open_bank(database, redis_url) as bank:
        yield bank


@pytest.fixture
def workers(database: str, redis_url: str, tmp_path: Path) -> Iterator[Family]:
    """A family that serves `q` alone."""
    with family(database, redis_url, app, tmp_path, pool={"queues": ["q"]}) as workers:
        yield workers


DIGITS = b"1" * 25
GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "a word": b"garbage",
    "2^63": str(2**63).encode(),
    "-1": b"-1",
    "NUL": b"\0",
    "bytes": bytes(range(256)),
    "a broken id": b"0198c0de-0000-7000-8000-00000000000",
    "36 letters": b"x" * 36,
    "36 bytes": b"\xff" * 36,
    "an id in braces": b'{"id": {"id": "0198c0de-0000-7000-8000-000000000001"}}',
    "an id that is a number": b'{"id": 7}',
    "an id that is null": b'{"id": null}',
    "an array": b'["0198c0de-0000-7000-8000-000000000001"]',
    "a long number": b'{"id": ' + b"9" * 5000 + b"}",
    "deep": b"[" * 100_000,
    "deep, with a long number": b"[" * 100_000 + DIGITS,
    "deep objects with a long number": b'{"a":' * 50_000 + DIGITS + b"}" * 50_000,
    "a million keys": b"{" + b",".join(b'"%d":0' % n for n in range(60_000)) + b"}",
    "NaN": b'{"id": NaN}',
    "ten megabytes": b"x" * 10_000_000,
    "ten megabytes of JSON": b'{"id": "0198c0de-0000-7000-8000-000000000001", "payload": "' + b"x" * 10_000_000 + b'"}',
    "a pickle": b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94.",
    "YAML": b"!!python/object/apply:os.system ['id']",
    "Celery": b'{"task": "os.system", "args": ["id"], "id": 1}',
}  # fmt: skip


@pytest.mark.parametrize("member", GARBAGE.values(), ids=GARBAGE)
def test_forged_redis_entries_name_no_job(member: bytes) -> None:
    """Each is no hint, and no error either."""
    assert hinted_id(member) is None


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
        lambda value: json.dumps(value).encode()
    )
)
def test_forged_redis_entries_of_any_bytes(member: bytes) -> None:
    """Any member is an id or nothing."""
    assert hinted_id(member) is None or isinstance(hinted_id(member), UUID)


def test_forged_redis_entries_run_nothing_that_postgres_does_not_allow(bank: Bank, workers: Family) -> None:
    """Ids of jobs that are done, cancelled, not due, another queue's, another's, or nobody's: dropped, and the honest job runs."""
    done, gone = bank.enqueue("honest", hint=False), bank.enqueue("honest", hint=False)
    later = bank.enqueue("honest", hint=False, run_at=datetime.now(UTC) + timedelta(hours=1))
    foreign = bank.enqueue("honest", hint=False, queue="other")
    paused = bank.enqueue("honest", hint=False, queue="paused")
    bank.connection.execute("insert into pmqd.job_queues (name, is_active) values ('paused', false)")
    taken = bank.enqueue("honest", hint=False)
    for statement, job_id in (
        ("status = 'completed', completed_at = now(), ready = false", done),
        ("status = 'cancelled', cancelled_at = now(), ready = false", gone),
        (
            "status = 'running', ready = false, claim_token = gen_random_uuid(), worker_id = 'other', started_at = now()",
            taken,
        ),
    ):
        bank.connection.execute(f"update pmqd.jobs set {statement} where id = %s", [job_id])
    before = {job_id: bank.job(job_id) for job_id in (done, gone, later, paused, taken)}
    others = [foreign, bank.enqueue(None, hint=False, queue="other")]
    members = [*GARBAGE.values()]
    for job_id in (done, gone, later, paused, taken, *others, uuid4(), UUID(int=0)):
        members += [
            str(job_id).encode(),
            orjson.dumps({"id": str(job_id), "kind": "honest", "payload": {"text": "forged"}}),
        ] * 3
    random.Random(7).shuffle(members)
    for band in ("", ":high", ":low"):
        bank.redis.lpush(f"queue:q{band}", *members)
    wanted = bank.enqueue("honest", {"text": "true"}, hint=False)
    bank.redis.lpush(
        "queue:q:low", orjson.dumps({"id": str(wanted), "kind": "other", "payload": {"text": "forged"}})
    )
    slot = workers.start()
    assert bank.wait(wanted, timeout=30, watch=workers.logged)["result"] == "true"
    assert {job_id: bank.job(job_id) for job_id in before} == before
    # Another queue's jobs, in the lists of ours: given back as if nobody had claimed them.
    lists = [f"queue:q{band}" for band in ("", ":high", ":low")]
    wait_until(lambda: not any(bank.redis.llen(name) for name in lists), 20, "all entries are looked at")
    wait_until(lambda: all(bank.status(job_id) == "queued" for job_id in others), 20, "all are given back")
    assert [(bank.job(job_id)["attempt_count"], bank.logs(job_id)) for job_id in others] == [(0, [])] * 2
    assert workers.process(slot).is_alive()
    assert workers.stop(slot) == 0, workers.logged()
    assert not workers.records("did not expect")


def test_forged_redis_entries_are_counted(redis_url: str, bank: Bank) -> None:
    """What is no hint is dropped and counted; what names a job is passed on as the id alone."""
    broker = Broker(RedisSettings(url=redis_url), "test")
    try:
        known = uuid4()
        bank.redis.lpush("queue:q", str(known), *GARBAGE.values())
        hints = []
        while bank.redis.llen("queue:q"):
            broker.pop_start(["queue:q"], 100, 1.0)
            hints += broker.pop_finish()
        assert [hint.id for hint in hints] == [known]
        assert broker.dropped == len(GARBAGE)
    finally:
        broker.close()


@pytest.mark.parametrize("kind", ["string", "hash", "set", "stream", "zset"])
def test_forged_redis_entries_a_key_of_the_wrong_type(kind: str, bank: Bank, workers: Family) -> None:
    """A list's key that holds something else costs Redis, not the jobs: they are claimed from PostgreSQL."""
    make: dict[str, Callable[[], Any]] = {
        "string": lambda: bank.redis.set("queue:q", "x"),
        "hash": lambda: bank.redis.hset("queue:q", "a", "b"),
        "set": lambda: bank.redis.sadd("queue:q", "a"),
        "stream": lambda: bank.redis.xadd("queue:q", {"a": "b"}),
        "zset": lambda: bank.redis.zadd("queue:q", {"a": 1}),
    }
    make[kind]()
    job_id = bank.enqueue("honest", hint=False)
    slot = workers.start()
    bank.wait(job_id, timeout=20, watch=workers.logged)
    assert workers.process(slot).is_alive()
